"""`keras-kd demo`: teacher, students, files and a table, from one command."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import keras_kd.export
from keras_kd import datasets
from keras_kd.cli import inputs, options, outputs, trial
from keras_kd.cli.console import Terminal, import_keras, native_silence
from keras_kd.export.report.figures import percent
from keras_kd.export.staged_folder import made_aside
from keras_kd.export.target import check_names_free, check_writable
from keras_kd.export.writing import write_file
from keras_kd.utils.tables import fitted

if TYPE_CHECKING:
    import keras

_WRITTEN = ("student.keras", "teacher.keras", "report.html", "demo.json")


def demo(
    data: Annotated[
        str, typer.Option(metavar="DATA", help="`digits`, `tfds:NAME` or `FILE.npz`.")
    ] = "digits",
    data_dir: options.DataDir = None,
    image_size: options.ImageSize = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="FILE.keras", help="Your own teacher; one is trained without."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="For every model.  [default: 5 to 30, by sample count]"),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Runs of each student.  [default: 5, large data 1]"),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder to write.  [default: runs/DATA]")
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Silent = False,
) -> None:
    """Train a teacher, distill a student, export it, and prove the files.

    The same student is trained with and without the teacher, from equal seeds in equal steps: once
    with all labels, and once with one in ten and the other images unlabeled, as where a teacher
    comes from elsewhere. Of the students with all labels the one with the highest validation
    accuracy, plain or distilled, is exported to TFLite and ONNX, every file is run, and a table
    shows what each step cost and gained on the test samples.
    """
    started = time.monotonic()
    terminal = Terminal(as_json=as_json, quiet=quiet)
    folder = outputs.folder_of(out, Path("runs") / inputs.slug(data))
    # The cheap checks come first: Keras and its backend take seconds to import.
    keras_kd.export.check_folder(folder, overwrite)
    check_writable(folder)
    check_names_free(folder, _WRITTEN)
    inputs.check_data(data, "--data")
    if teacher is not None:
        inputs.check_model_file(teacher, "teacher")
    if data.startswith("tfds:"):
        import_keras()
    with terminal.working():
        loaded = datasets.load(
            data,
            data_dir=data_dir,
            image_size=None if image_size is None else (image_size, image_size),
        )
    import_keras()
    model = None
    if teacher is not None:
        model = inputs.load_model(teacher, "teacher")
        inputs.check_classifier(model, "teacher", loaded)
    plan = trial.make_plan(loaded, epochs, seeds)
    terminal.note(_introduction(loaded, plan, epochs, seeds))

    with terminal.working() as work:
        if model is None:
            model = trial.train_teacher(loaded, plan, work)
        runs = trial.train_students(loaded, model, plan, work)
        kind, chosen = trial.best_run({name: runs[name] for name in ("plain", "distilled")})
        student = trial.restored(loaded, chosen)
        with made_aside(folder, overwrite=overwrite, beside=_WRITTEN) as made:
            report = keras_kd.export.export_model(
                student,
                made,
                calibration=loaded.x_train,
                evaluation=(loaded.x_validation, loaded.y_validation),
                labels=loaded.class_names,
                name=inputs.slug(data),
                history=chosen.history,
                teacher=model,
                progress=inputs.stages(work, "export: "),
            )
            proof = keras_kd.export.verify(made, progress=inputs.stages(work, "check again: "))
            result = _result(loaded, plan, model, runs, kind, chosen, report, proof)
            result["seconds"] = round(time.monotonic() - started, 1)
            student.save(made / "student.keras")
            model.save(made / "teacher.keras")
            report.save_html(made / "report.html")
            write_file(made / "demo.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    terminal.result(
        {**result, "out": str(folder)}, table(result, terminal.width), "", *remarks(result, folder)
    )
    raise typer.Exit(0 if result["best"] is not None else 1)


def _introduction(
    data: datasets.Dataset, plan: trial.Plan, epochs: int | None, seeds: int | None
) -> str:
    sizes = data.sizes
    shape = " x ".join(map(str, data.input_shape))
    lines = [
        f"{data.name}: {sizes['train']:,} training, {sizes['validation']:,} validation and "
        f"{sizes['test']:,} test images of {shape}, {data.num_classes} classes.",
        *data.notes,
        f"{plan.epochs} epochs{'' if epochs else ' (--epochs sets it)'} and {plan.seeds} "
        f"{'seed' if plan.seeds == 1 else 'seeds'}{'' if seeds else ' (--seeds sets it)'}, "
        f"{plan.batch_size} images a step; all labels, and {int(trial.labeled(data, 0).sum()):,}.",
    ]
    return "\n".join(lines)


def _result(
    data: datasets.Dataset,
    plan: trial.Plan,
    teacher: keras.Model,
    runs: dict[str, list[trial.Run]],
    kind: str,
    chosen: trial.Run,
    report: Any,
    proof: Any,
) -> dict[str, Any]:
    """Everything that was measured, as plain JSON values."""
    from keras_kd.export.formats.runtime import open_file, run_all

    answers = trial.decide(teacher, data.x_test)
    keras_rows = {row["name"]: row for row in report.rows() if row["name"] in ("teacher", "keras")}
    models: dict[str, Any] = {
        "teacher": {
            "accuracy": trial.share(answers, data.y_test),
            **{key: keras_rows["teacher"][key] for key in ("parameters", "bytes", "latency_ms")},
        }
    }
    for name, done in runs.items():
        models[name] = {
            "accuracy": trial.spread([run.accuracy for run in done]),
            "agreement": trial.spread([run.agreement for run in done]),
            "runs": [
                {
                    "seed": run.seed,
                    "accuracy": run.accuracy,
                    "agreement": run.agreement,
                    "validation_accuracy": run.validation_accuracy,
                }
                for run in done
            ],
            **{key: keras_rows["keras"][key] for key in ("parameters", "bytes", "latency_ms")},
        }
    proven = {artifact.file: artifact.passed for artifact in proof.artifacts}
    files = []
    for artifact in report.artifacts:
        row = {
            "name": f"{artifact.format} {artifact.precision}",
            "file": artifact.file,
            "bytes": artifact.bytes,
            "gzip_bytes": artifact.gzip_bytes,
            "latency_ms": artifact.latency_ms,
            "accuracy": None,
            "agreement": None,
            "verified": artifact.passed and proven[artifact.file],
            "reason": artifact.reason,
            "flags": list(artifact.flags),
        }
        if artifact.passed:
            with native_silence():
                runtime = open_file(artifact.path)
                name = runtime.signature()["inputs"][0]["name"]
                outputs = next(iter(run_all(runtime, {name: data.x_test}).values()))
            decisions = outputs.argmax(axis=-1)
            row["accuracy"] = trial.share(decisions, data.y_test)
            row["agreement"] = trial.share(decisions, answers)
        files.append(row)
    best = None if proof.best is None else proof.best.file
    return {
        "data": {
            "name": data.name,
            "samples": data.sizes,
            "input_shape": list(data.input_shape),
            "classes": list(data.class_names),
            "notes": list(data.notes),
        },
        "epochs": plan.epochs,
        "seeds": plan.seeds,
        "batch_size": plan.batch_size,
        "models": models,
        "gain": trial.gain(runs["distilled"], runs["plain"]),
        "few_labels": {
            "labels": int(trial.labeled(data, 0).sum()),
            "gain": trial.gain(runs["few_distilled"], runs["few_plain"]),
        },
        "exported_kind": kind,
        "exported_seed": chosen.seed,
        "files": files,
        "best": best,
        "max_drop": report.manifest["settings"]["max_drop"],
    }


def table(result: dict[str, Any], width: int = 80) -> str:
    """Lay the figures out as a table.

    Args:
        result: What `demo.json` holds.
        width: Most columns of text. Where they are few, the least important figures are left out.

    Returns:
        The text.
    """
    from keras_kd.export.report.figures import latency, size

    models = result["models"]
    teacher = models["teacher"]
    rows = [
        [
            "teacher",
            percent(teacher["accuracy"]),
            "",
            f"{teacher['parameters']:,}",
            size(teacher["bytes"]),
            "",
            latency(teacher["latency_ms"]),
            "",
        ]
    ]
    for kind in trial.KINDS:
        row = models[kind]
        few = kind.startswith("few")
        rows.append(
            [
                trial.SHORT[kind] if few else f"student, {kind}",
                _mean(row["accuracy"]),
                percent(row["agreement"]["mean"]),
                f"{row['parameters']:,}",
                size(row["bytes"]),
                "",
                latency(row["latency_ms"]),
                "",
            ]
        )
    if result["seeds"] > 1:
        seed = result["exported_seed"]
        kind = result["exported_kind"]
        run = models[kind]["runs"][seed]
        rows.append(
            [
                f"  {kind}, seed {seed}",
                percent(run["accuracy"]),
                percent(run["agreement"]),
                *[""] * 5,
            ]
        )
    for row in result["files"]:
        mark = "* " if row["file"] is not None and row["file"] == result["best"] else "  "
        rows.append(
            [
                mark + row["name"],
                percent(row["accuracy"]),
                percent(row["agreement"]),
                "",
                size(row["bytes"]),
                size(row["gzip_bytes"]),
                latency(row["latency_ms"]),
                "yes" if row["verified"] else "no",
            ]
        )
    headings = ["", "accuracy %", "agree", "params", "size", "gzip", "ms", "verified"]
    spare = ("params", "verified", "gzip", "agree")
    return "\n".join(fitted(headings, rows, width=width, dispensable=spare))


def remarks(result: dict[str, Any], folder: Path) -> list[str]:
    """Say what the figures mean, which file to take, and what was seen on the way.

    Args:
        result: What `demo.json` holds.
        folder: Where the files are.

    Returns:
        One paragraph each.
    """
    from keras_kd.export.report.scorecard import points

    samples = result["data"]["samples"]
    few = result["few_labels"]
    lines = [
        _verdict("All labels", result["gain"], result["seeds"]),
        _verdict(
            f"One label in ten ({few['labels']:,} of {samples['train']:,}; of the others the "
            "distilled student sees image and teacher's answer)",
            few["gain"],
            result["seeds"],
        ),
    ]
    lines.append(
        f"Exported: {result['exported_kind']}, seed {result['exported_seed']}, the highest "
        "validation accuracy of the students with all labels."
    )
    if result["best"] is None:
        lines.append("No file passed its check: the reasons are below and in report.html.")
    else:
        best = next(row for row in result["files"] if row["file"] == result["best"])
        ratio = result["models"]["teacher"]["bytes"] / best["bytes"]
        lines.append(
            f"* Take {best['file']}: the smallest that lost at most {points(result['max_drop'])} "
            f"on the {samples['validation']:,} validation images; {ratio:.1f} times smaller than "
            "the teacher's weights."
        )
    for row in result["files"]:
        lines.extend(f"! {row['name']}: {flag}." for flag in row["flags"])
        if row["reason"]:
            lines.append(f"x {row['name']}: {row['reason']}.")
    lines.append(
        f"Accuracy and agreement with the teacher: on the {samples['test']:,} test images, which "
        "chose nothing. Size: the file, for Keras models the float32 weights. Time: one image, one "
        "thread, median; for Keras models one call of `predict_on_batch`."
    )
    lines.append(
        f"Written to {folder} in {result['seconds']:.0f} s. Open {folder / 'report.html'}, and "
        f"check the files anywhere with: keras-kd verify {folder}"
    )
    return lines


def _verdict(case: str, gain: dict[str, float | None], seeds: int) -> str:
    mean, error, limit = gain["mean"], gain["standard_error"], gain["limit"]
    assert mean is not None
    figure = f"{_signed(100 * mean)} points of accuracy over the plain student"
    if gain["std"] is None or error is None or limit is None:
        clear = mean != 0
        how = "one seed, so chance plays a part: --seeds 5 shows the spread"
    else:
        # Less than half of its 95 % interval is within the noise of the seeds.
        clear = abs(mean) > limit
        figure = (
            f"{_signed(100 * mean)} ± {100 * gain['std']:.2f} points of accuracy over the plain "
            f"student, standard error {100 * error:.2f}"
        )
        how = f"{seeds} seeds in pairs, equal steps"
    if mean > 0 and clear:
        word = "distillation helped"
    elif mean < 0 and clear:
        word = "distillation did not help here, the plain student is better"
    else:
        word = "distillation made no clear difference here"
    return f"{case}: {word}: {figure} ({how})."


def _signed(points: float) -> str:
    return f"{points:+.2f}"


def _mean(values: dict[str, float | None]) -> str:
    mean, std = values["mean"], values["std"]
    return percent(mean) if std is None else f"{percent(mean)} ± {100 * std:.2f}"
