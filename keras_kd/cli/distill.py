"""`keras-kd distill`: an own teacher, an own student, own data, any task, to verified files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import keras_kd.export
from keras_kd import datasets
from keras_kd.cli import (
    config_file,
    distill_result,
    distill_training,
    inputs,
    options,
    outputs,
    recipes,
    teachers,
)
from keras_kd.cli.console import Terminal, import_keras
from keras_kd.export import checks, warm
from keras_kd.export.checks import known_precisions
from keras_kd.export.staged_folder import made_aside
from keras_kd.export.writing import write_file

_WRITTEN = ("student.keras", "distill.json", "distill.toml", "inputs.json", "report.html")
_PRECISIONS = ", ".join(known_precisions())


def distill(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.toml",
            help="Options from a file, as saved by an earlier call; those of the line win.",
            callback=lambda context, value: config_file.read(context, value, distill),
            is_eager=True,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="A `.npz`, CSV or CoNLL file, a folder of images or recordings, `tfds:NAME` or "
            "`digits`.",
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="classification, multilabel, regression, tokens or ranking.")
    ] = "classification",
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEACHER",
            help="`FILE.keras`, `FILE.onnx`, `FILE.tflite`, `FILE.npz` with answers, a cache, or "
            "`gradient-boosting` or `random-forest`, trained on your rows. Several are averaged.",
        ),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            metavar="STUDENT",
            help="`FILE.keras`, or `shrink:0.5`: the teacher at half the width; `shrink:0.5,0.5`: "
            "and half the depth.",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help=f"{', '.join(recipes.METHODS)}. `auto` tries some on held-out rows.")
    ] = recipes.AUTO,
    validation: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Rows that choose.  [default: a tenth of DATA]"),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Rows that are reported.  [default: a fifth of DATA]"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="CSV: the label; several, separated by commas."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="CSV: its words are the input.")
    ] = None,
    category: Annotated[
        str | None,
        typer.Option(metavar="COLUMNS", help="CSV: numbers that are categories all the same."),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="CSV, ranking: rows with the same value are one list."),
    ] = None,
    leave_out: Annotated[
        str | None, typer.Option(metavar="COLUMNS", help="CSV: columns that are no input.")
    ] = None,
    standardize: Annotated[
        bool, typer.Option("--standardize", help="CSV: columns of mean 0 and deviation 1.")
    ] = False,
    unlabeled: Annotated[
        bool,
        typer.Option("--unlabeled", help="CSV: keep rows without a target, for the teacher alone."),
    ] = False,
    delimiter: Annotated[str | None, typer.Option(help="CSV: what separates cells.")] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Names in the order of the teacher's units, separated by commas."),
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Texts and tokens: one word a line."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Words read of a text, samples of a recording."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Resize images to N by N pixels.")
    ] = None,
    data_dir: options.DataDir = None,
    temperature: Annotated[float | None, typer.Option(help="Of the soft targets.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Weight of the labels, in [0, 1].  [default: 0.5]")
    ] = None,
    label_weight: Annotated[
        float | None, typer.Option(help="Weight of the labels, in place of --alpha.")
    ] = None,
    teacher_weight: Annotated[
        float | None, typer.Option(help="Weight of the teacher, in place of --alpha.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="[default: 5 to 100, by sample count]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="[default: 32, large data 128]")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Of Adam; falls to 0 by a cosine.")] = 1e-3,
    seed: Annotated[int, options.seed("Of weights and the order of rows.")] = 0,
    formats: Annotated[str, typer.Option(help="Separated by commas.")] = "tflite,onnx",
    precisions: Annotated[
        str, typer.Option(help=f"Separated by commas, of: {_PRECISIONS}.")
    ] = "float32,float16,dynamic,int8",
    metrics: Annotated[
        str | None,
        typer.Option(help="What judges files.  [default: the task's, as accuracy or ndcg@10]"),
    ] = None,
    max_drop: Annotated[
        float, typer.Option(help="What a file may lose of it, as a share: 0.01 is one point.")
    ] = 0.01,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUNTIME",
            help="Files take one row at a time, and the best one has to run there, as in "
            "tflite-2.14 or ethos-u55. May be given several times.",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder to write.  [default: runs/DATA]")
    ] = None,
    save_config: Annotated[
        str | None, typer.Option(metavar="FILE.toml", help="Write the options to a file.")
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Silent = False,
) -> None:
    """Distill your teacher into your student on your data, and prove the files.

    The student learns from the labels and the teacher, is exported to TFLite and ONNX by what
    validation rows say, and every file is run on test rows, which chose nothing. The folder gets
    the files, `student.keras`, `report.html`, `distill.json`, `inputs.json` (how rows become
    inputs) and `distill.toml`, with which `--config` does the same again.

    Exit code 0 if a file passed, 1 if none did, 2 for bad input.
    """
    started = time.monotonic()
    terminal = Terminal(as_json=as_json, quiet=quiet)
    # In the order of the help: that of `params` follows the line.
    declared = [str(option.name) for option in context.command.params]
    left_out = (*config_file.UNSAVED, "as_json", "quiet", "overwrite")
    given = {name: context.params[name] for name in declared if name not in left_out}
    if not data or not teacher or not student:
        lacks = "--data" if not data else "--teacher" if not teacher else "--student"
        raise ValueError(f"`{lacks}` is missing. See `keras-kd distill --help`.")
    method = recipes.check_method(method)
    weights = {
        "alpha": alpha,
        "temperature": temperature,
        "label_weight": label_weight,
        "teacher_weight": teacher_weight,
    }
    recipes.check_weights(method, weights)
    distill_training.check_student(student, inside=False)
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"`--learning-rate` is above 0. Received: {learning_rate!r}.")
    folder = outputs.folder_of(out, Path("runs") / inputs.slug(data))
    asked_formats, asked_precisions = inputs.words(formats), inputs.words(precisions)
    devices = inputs.words_of_all(device)
    checks.asked(
        folder,
        asked_formats,
        asked_precisions,
        name=inputs.slug(data),
        overwrite=overwrite,
        max_drop=max_drop,
        batch=1 if devices else None,
        targets=devices,
        beside=_WRITTEN,
    )
    for name in teacher:
        teachers.check(name, inside=False)
    outputs.check_file_to_write(save_config, "--save-config")
    if save_config is not None:
        # The package that writes it is missed now rather than after the training.
        config_file.text(given, given)
    asked: dict[str, Any] = {
        "target": inputs.words(target),
        "validation": validation,
        "test": test,
        "text": text,
        "categories": inputs.words(category),
        "leave_out": inputs.words(leave_out),
        "classes": inputs.words(classes) or None,
        "standardize": standardize,
        "unlabeled": unlabeled,
        "vocabulary": vocabulary,
        "length": length,
        "delimiter": delimiter,
        "image_size": None if image_size is None else (image_size, image_size),
        "data_dir": data_dir,
        "group": group,
    }
    if data.startswith("tfds:"):
        import_keras()
    with terminal.working():
        loaded = datasets.load_task(data, task, **asked)
    # What is in the models comes behind what is in the data, and before Keras.
    distill_training.check_student(student)
    for name in teacher:
        teachers.check(name)
    warm.prepare("convert")
    import_keras()
    with contextlib.ExitStack() as stack:
        plan = distill_training.make_plan(loaded, epochs, batch_size, learning_rate, seed)
        model = distill_training.load_student(student, loaded)
        single = model is not None and recipes.is_single(model)
        found = [teachers.load(name, loaded, stack, single) for name in teacher]
        if model is None:
            model = distill_training.shrunk(student, found, loaded, seed)
        compiled = (
            None
            if method == recipes.PLAIN
            else recipes.distillation(method, loaded.learns, **weights)
        )
        teaching = teachers.together(found)
        distill_training.check_metrics(loaded, model, inputs.words(metrics))
        terminal.note(distill_training.introduction(loaded, plan, teacher, method))
        with terminal.working() as work:
            history, choice = distill_training.train(
                model, teaching, loaded, plan, compiled, work, quiet=quiet
            )
            judges = distill_training.judges(loaded, model, inputs.words(metrics))
            with made_aside(folder, overwrite=overwrite, beside=_WRITTEN) as made:
                report = keras_kd.export.export_model(
                    model,
                    made,
                    calibration=loaded.train.x,
                    evaluation=(loaded.validation.x, loaded.validation.y),
                    formats=asked_formats,
                    precisions=asked_precisions,
                    metrics=judges,
                    max_drop=max_drop,
                    labels=(loaded.class_names or None) if recipes.RECIPES[task].by_class else None,
                    normalization=inputs.pixels_of(loaded.inputs),
                    batch=1 if devices else None,
                    targets=devices,
                    name=inputs.slug(data),
                    history=history,
                    teacher=found[0].model if len(found) == 1 else None,
                    progress=inputs.stages(work, "export: "),
                )
                proof = keras_kd.export.verify(made, progress=inputs.stages(work, "check again: "))
                result = distill_result.collect(loaded, model, found, report, proof)
                result |= {
                    "method": method,
                    "choice": choice,
                    "plan": dataclasses.asdict(plan),
                    "settings": {k: value for k, value in given.items() if value is not None},
                    "seconds": round(time.monotonic() - started, 1),
                }
                model.save(made / "student.keras")
                report.save_html(made / "report.html")
                for name, document in (("distill.json", result), ("inputs.json", loaded.inputs)):
                    write_file(made / name, json.dumps(document, indent=2, allow_nan=False) + "\n")
                with contextlib.suppress(ImportError):
                    config_file.save(made / "distill.toml", given, given)
    if save_config is not None:
        config_file.save(save_config, given, given)
    terminal.result(
        {**result, "out": str(folder)},
        *distill_result.tables(result, terminal.width),
        "",
        *distill_result.remarks(result, folder),
    )
    raise typer.Exit(0 if result["best"] is not None else 1)
