"""`keras-kd export`: a `.keras` file to verified TFLite and ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import keras_kd.export
from keras_kd.cli import inputs, options
from keras_kd.cli.console import Terminal, import_keras
from keras_kd.export import checks, warm
from keras_kd.export.checks import known_precisions
from keras_kd.export.staged_folder import made_aside

_PRECISIONS = ", ".join(known_precisions())
_WRITTEN = ("report.html",)


def export(
    student: Annotated[str, typer.Argument(metavar="STUDENT.keras", help="The model to export.")],
    calibration: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Typical inputs, which int8 needs."),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Inputs, and labels, to test the files on."),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder to write.  [default: exported/NAME]")
    ] = None,
    formats: Annotated[str, typer.Option(help="Separated by commas.")] = "tflite,onnx",
    precisions: Annotated[
        str, typer.Option(help=f"Separated by commas, of: {_PRECISIONS}.")
    ] = "float32,float16,dynamic,int8",
    max_drop: Annotated[
        float, typer.Option(help="Accuracy a file may lose, as a share: 0.01 is one point.")
    ] = 0.01,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="What files are judged by in place of accuracy: auc, macro_f1, mae, ndcg@10, or "
            "the name of a Keras metric. Several, separated by commas, are reported; the first "
            "judges."
        ),
    ] = None,
    objective: Annotated[str, typer.Option(help="What is best: `size` or `latency`.")] = "size",
    labels: Annotated[
        str | None, typer.Option(help="Names of the classes, separated by commas.")
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            help="Of image pixels 0..255, one number or one a channel: the model's input is "
            "(pixel - mean) / std. Written into the files."
        ),
    ] = None,
    std: Annotated[str | None, typer.Option(help="Given together with --mean.")] = None,
    sparse: Annotated[
        bool,
        typer.Option(
            help="Store TFLite weights of pruned models without their zeros, which LiteRT and "
            "TensorFlow Lite read, and most others refuse."
        ),
    ] = False,
    batch: Annotated[
        int | None,
        typer.Option(help="1 fixes the batch size, which some runtimes need.  [default: free]"),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUNTIME",
            help="Choose only files that run there, such as tflite-2.14 or ethos-u55. May be given "
            "several times.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="First part of the file names.  [default: as STUDENT]")
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Export a model to TFLite and ONNX, run every file, and say which one to take.

    DATA is a `.npz` file that holds `x` (and `y`: class numbers, or targets; and
    `sample_weight`), or one array for each input by its name. It may also be a data set, `digits`,
    `tfds:NAME` or a `.npz` file with `x_train` and `y_train` and maybe the same of `validation` and
    `test`: then training rows calibrate and validation rows evaluate. Images of bytes are scaled
    to [0, 1] for a model of images; all other rows are taken as they are.

    Exit code 0 if a file passed, 1 if none did, 2 for bad input.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    for option, text in (
        ("--metrics", metrics),
        ("--labels", labels),
        *(("--target", one) for one in target or []),
    ):
        if text is not None and not _words(text):
            raise ValueError(
                f"`{option}` names nothing. Received: {text!r}. Leave it out for its default."
            )
    if name == "" or out == "":
        raise ValueError(f"`{'--name' if name == '' else '--out'}` is empty. Leave it out.")
    folder = Path(out) if out is not None else Path("exported") / Path(student).stem
    pixels = _normalization(mean, std)
    # The cheap checks come first: Keras and its backend take seconds to import.
    inputs.check_model_file(student, "model")
    inputs.check_data(calibration, "--calibration")
    inputs.check_data(evaluation, "--evaluation")
    targets = [word for part in target or [] for word in _words(part)]
    asked = checks.asked(
        folder,
        _words(formats),
        _words(precisions),
        name=name or Path(student).stem,
        overwrite=overwrite,
        max_drop=max_drop,
        objective=objective,
        batch=batch,
        targets=targets,
        beside=_WRITTEN,
    )
    # The converter imports TensorFlow at the same time.
    warm.prepare("convert")
    import_keras()
    model = inputs.load_model(student, "model")
    given: dict[str, Any] = {}
    notes: list[str] = []
    for role, path in (("calibration", calibration), ("evaluation", evaluation)):
        if path is not None:
            x, y, note = inputs.read_samples(path, role, model)
            notes.append(note)
            if role == "calibration" or y is None:
                given[role] = x
            else:
                given[role] = (x, y, inputs.read_weights(path, model))
    with (
        terminal.working() as work,
        made_aside(folder, overwrite=overwrite, beside=_WRITTEN) as made,
    ):
        report = keras_kd.export.export_model(
            model,
            made,
            formats=asked.formats,
            precisions=asked.precisions,
            max_drop=max_drop,
            metrics=None if metrics is None else _words(metrics),
            objective=objective,
            labels=None if labels is None else _words(labels),
            normalization=pixels,
            sparse=sparse,
            batch=batch,
            targets=asked.targets,
            name=name or Path(student).stem,
            progress=work,
            **given,
        )
        report.save_html(made / "report.html")
    report = keras_kd.export.Report.load(folder)
    terminal.result(
        report.to_dict(),
        report.table(terminal.width),
        "",
        *notes,
        f"Files and report.html are in {folder}. Check them with: keras-kd verify {folder}",
    )
    raise typer.Exit(0 if report.ok else 1)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _normalization(mean: str | None, std: str | None) -> tuple[list[float], list[float]] | None:
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError(
            "`--mean` and `--std` belong together, and one of them is missing. For inputs in 0..1 "
            "pass --mean 0 --std 255."
        )
    try:
        first, second = ([float(word) for word in _words(text)] for text in (mean, std))
    except ValueError:
        raise ValueError(
            f"`--mean` and `--std` are numbers separated by commas. Received: --mean {mean} "
            f"--std {std}."
        ) from None
    return first, second
