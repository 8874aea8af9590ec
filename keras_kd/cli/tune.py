"""`keras-kd tune`: the best file within a budget, from a teacher, data and time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from keras_kd import datasets
from keras_kd.cli import inputs, options, outputs
from keras_kd.cli.console import Terminal, Work, import_keras
from keras_kd.cli.distill_training import repeatable
from keras_kd.export.formats.device_table import check_targets
from keras_kd.export.report.export_report import Report
from keras_kd.export.staged_folder import written_together
from keras_kd.export.target import check_writable
from keras_kd.search.budget import Budget
from keras_kd.search.space import METHODS, PRECISIONS, Choice, Float, Log, Space
from keras_kd.search.study import OBJECTIVES, objectives
from keras_kd.utils.escaping import plain

_RANGES = {
    "temperature": Log,
    "alpha": Float,
    "learning_rate": Log,
    "width": Float,
    "depth": Float,
}


def tune(
    teacher: Annotated[
        str, typer.Option(metavar="FILE.keras", help="The teacher, which students are made of.")
    ],
    data: Annotated[
        str, typer.Option(metavar="DATA", help="`digits`, `tfds:NAME` or `FILE.npz`.")
    ] = "digits",
    data_dir: options.DataDir = None,
    image_size: options.ImageSize = None,
    minimize: Annotated[
        str, typer.Option(help=f"Separated by commas, of: {', '.join(OBJECTIVES)}.")
    ] = "error",
    minutes: Annotated[float, typer.Option(help="Of searching at most.")] = 60.0,
    trials: Annotated[int | None, typer.Option(help="Most trials.  [default: no limit]")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Most bytes of the file.")] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Most milliseconds of one inference on this machine.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUNTIME",
            help="The file has to run there, as in tflite-2.14 or ethos-u55. May be given several "
            "times.",
        ),
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="What is searched: options separated by commas, `width=0.25,0.5`, or a range, "
            f"`temperature=1..20`. Methods: {', '.join(METHODS)}; precisions: "
            f"{', '.join(PRECISIONS)}. May be given several times.  [default: all but precision]",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of a trial.  [default: 5 to 30, by sample count]")
    ] = None,
    final_epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the last trainings.  [default: three times the epochs, if time allows]"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 32,
    seeds: Annotated[int, typer.Option(min=2, help="How often the winner is trained again.")] = 3,
    seed: Annotated[int, options.seed("Of the proposals.")] = 0,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder of the search.  [default: runs/search-DATA]"),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Silent = False,
) -> None:
    """Search the best file within a budget: method, temperature, size, learning rate.

    Candidates are smaller copies of the teacher. Their files are weighed before they are trained,
    and judged by what they answer on the validation rows. Killed or ended, the same call goes on
    where it was, and several of them may work on one folder. The folder gets `search.html`,
    `front.png`, `best.toml`, and `distilled/` with the file, as `keras-kd distill --config
    best.toml` makes it again.

    Exit code 0 if a file is within the budget, 1 if none is, 2 for bad input.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    budget = Budget(minutes, max_bytes, max_latency_ms, trials)
    space = _space(search or [])
    if space is not None:
        Space(space, own=False, classes=True, depth=True)
    least = inputs.words(minimize)
    objectives(least)
    devices = inputs.words_of_all(device)
    check_targets(devices)
    folder = outputs.folder_of(out, Path("runs") / f"search-{inputs.slug(data)}")
    # The cheap checks come first: Keras and its backend take seconds to import.
    inputs.check_model_file(teacher, "teacher")
    inputs.check_data(data, "--data")
    check_writable(folder)
    if data.startswith("tfds:"):
        import_keras()
    with terminal.working():
        read = datasets.load_task(
            data,
            data_dir=data_dir,
            image_size=None if image_size is None else (image_size, image_size),
        )
    loaded = _labeled_rows(read)
    import_keras()
    repeatable()
    model = inputs.load_model(teacher, "teacher")
    inputs.check_classifier(model, "teacher", loaded)
    terminal.note("\n".join([_introduction(loaded, budget, folder), *loaded.notes]))
    from keras_kd.search.tuner import tune as run

    # Whole paths: `best.toml` is read from any folder, and may be moved.
    found = os.path.abspath(data) if data.endswith(".npz") else data
    config: dict[str, Any] = {"teacher": [os.path.abspath(teacher)], "data": found}
    config |= {} if data_dir is None else {"data_dir": os.path.abspath(data_dir)}
    config |= {} if image_size is None else {"image_size": image_size}
    with terminal.working() as work:
        study = run(
            "shrink",
            model,
            (loaded.x_train, loaded.y_train),
            (loaded.x_validation, loaded.y_validation),
            space=space,
            minimize=least,
            device=devices,
            budget=budget,
            seeds=seeds,
            folder=folder,
            epochs=epochs,
            final_epochs=final_epochs,
            batch_size=batch_size,
            seed=seed,
            config=config,
            export={
                "labels": list(loaded.class_names),
                "normalization": inputs.pixels_of(read.inputs),
                "name": inputs.slug(data),
            },
            progress=_told(work),
            verbose=0,
        )
        with written_together(folder) as made:
            if study.best is not None:
                config_file = study.save_config(made / "best.toml")
                work("distill", 0, 1, "by keras-kd distill --config best.toml")
                _distilled(study, loaded, budget, config_file)
                work("distill", 1, 1)
            if study.rows():
                study.save_html(made / "search.html")
                study.plot(made / "front.png")
    texts = [study.table(terminal.width)]
    if study.best is not None:
        texts += [
            "",
            f"Train it again with: keras-kd distill --config {folder / 'best.toml'}. Open "
            f"{folder / 'search.html'}.",
        ]
    terminal.result(study.to_dict(), *texts)
    raise typer.Exit(0 if study.best is not None else 1)


def _labeled_rows(read: datasets.TaskData) -> datasets.Dataset:
    """The rows that `keras-kd distill` reads, of which every one has a label and one input."""
    if isinstance(read.train.x, dict):
        raise ValueError(
            f"`{read.name}` has the inputs {', '.join(read.train.x)}, and models of one input are "
            "searched here. Search others in Python with `keras_kd.search.tune`."
        )
    without = int((~read.labeled).sum())
    if without:
        raise ValueError(
            f"{without:,} training rows of `{read.name}` have no label, and the search trains on "
            "labeled rows. Leave them out, and let `keras-kd distill` learn from them afterwards."
        )
    x = read.train.x
    notes = read.notes
    if x.dtype.kind in "iu" and x.ndim > 2:
        notes += (
            f"The inputs are {x.dtype} and are taken as they are; images of uint8 would be scaled "
            "to [0, 1].",
        )
    return datasets.Dataset(
        name=read.name,
        x_train=read.train.x,
        y_train=read.train.y,
        x_validation=read.validation.x,
        y_validation=read.validation.y,
        x_test=read.test.x,
        y_test=read.test.y,
        class_names=read.class_names,
        notes=notes,
    )


def _distilled(study: Any, data: datasets.Dataset, budget: Budget, config: Path) -> None:
    """Make the file as `keras-kd distill --config best.toml` makes it, wherever that is called.

    Args:
        study: What the search found.
        data: Its validation rows judge the file.
        budget: What it has to keep to.
        config: What is going to be `best.toml`.

    Raises:
        ValueError: If that fails.
    """
    from keras_kd.distill.training_rows import Rows
    from keras_kd.export import load
    from keras_kd.search.files import latencies

    out, searched = study.folder / "distilled", study.best["file"]
    before = searched.read_bytes() if searched.is_file() else b""
    words = ["distill", "--config", str(config), "--out", str(out)]
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "keras_kd", *words, "--overwrite", "--json", "--quiet"],
        capture_output=True,
        text=True,
    )
    if ended.returncode != 0:
        said = (ended.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise ValueError(f"`keras-kd {' '.join(words)}` failed: {plain(said)}")
    path = Report.load(out).artifacts[0].path
    assert path is not None
    if path.read_bytes() == before:
        study.take(path, study.best["error"], study.best["latency_ms"])
        return
    wrong = load(path)(data.x_validation).argmax(-1) != data.y_validation
    (times,) = latencies([path], Rows(data.x_validation, data.y_validation))
    size = path.stat().st_size
    beyond = [name for name, by in budget.excess(size, times.low_ms).items() if by > 0]
    if beyond:
        limits = budget.limits()
        told = {"bytes": f"{size:,} bytes", "latency_ms": f"{times.median_ms:.3g} ms"}
        said = " and ".join(f"{told[name]} against {limits[name]:,}" for name in beyond)
        study.remark(f"the file of `keras-kd distill --config best.toml` has {said}")
        return
    study.take(path, float(wrong.mean()), times.median_ms)


def _told(work: Work) -> Callable[[str, int, int, str], None]:
    def tell(stage: str, done: int, total: int, remark: str) -> None:
        work(stage, done, total, remark if len(remark) < 60 else f"{remark[:57]}...")

    return tell


def _introduction(data: datasets.Dataset, budget: Budget, folder: Path) -> str:
    limits = [
        f"{name.replace('_', ' ')} {value:g}"
        for name, value in (
            ("minutes", budget.minutes),
            ("trials", budget.trials),
            ("bytes", budget.bytes),
            ("latency_ms", budget.latency_ms),
        )
        if value is not None
    ]
    sizes = data.sizes
    return (
        f"{data.name}: {sizes['train']:,} training and {sizes['validation']:,} validation rows; "
        f"the {sizes['test']:,} test rows are not looked at. Limits: {', '.join(limits)}. Folder "
        f"{folder}."
    )


def _space(given: list[str]) -> dict[str, Any] | None:
    """The space of `--search`, `None` for the default one."""
    if not given:
        return None
    space: dict[str, Any] = {}
    for text in given:
        name, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not values:
            raise ValueError(
                f"`--search {text}` is no parameter. Expected `NAME=VALUE,VALUE` or "
                "`NAME=LOW..HIGH`."
            )
        name = name.replace("-", "_")
        if name in space:
            raise ValueError(f"`--search {name}` is given twice. Put all its values into one.")
        low, dots, high = values.partition("..")
        if dots:
            kind: Any = _RANGES.get(name, Float)
            space[name] = kind(_number(low, text), _number(high, text))
        else:
            names = name in ("method", "precision")
            words = inputs.words(values)
            space[name] = Choice(*(words if names else (_number(word, text) for word in words)))
    return space


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"`--search {option}`: `{text}` is no number.") from None
