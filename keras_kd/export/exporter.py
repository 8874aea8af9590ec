"""The whole way of one export: check, convert, verify, weigh, choose, put in place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.export import arguments, checks, jobs, manifest, warm
from keras_kd.export.checks import PRECISIONS
from keras_kd.export.formats import registry
from keras_kd.export.formats.base import Format
from keras_kd.export.jobs import Progress
from keras_kd.export.mixed import quietly, try_mixed
from keras_kd.export.report.export_report import Report
from keras_kd.export.rows import (
    ArtifactRow,
    Converted,
    ConvertTask,
    Dense,
    Failure,
    FileRow,
    LayerRow,
    Measured,
    MeasureTask,
    NoiseTask,
    to_json,
)
from keras_kd.export.scratch import working_folder
from keras_kd.export.signature import Arrays, is_symbolic
from keras_kd.export.source import data
from keras_kd.export.source.data import CALIBRATION_SAMPLES
from keras_kd.export.staged_folder import place, staging
from keras_kd.export.tensor_names import layer_names
from keras_kd.export.verification import acceptance
from keras_kd.export.verification.keras_answers import (
    answer,
    check_arguments,
    check_class_names,
    check_teacher,
    read_normalization,
    teacher_figures,
)
from keras_kd.export.verification.reference import Reference, with_chosen
from keras_kd.export.verification.timing import TIMED
from keras_kd.export.verification.useless_files import Causes
from keras_kd.utils.types import Data

if TYPE_CHECKING:
    import keras


def export_model(
    model: keras.Model,
    folder: str | os.PathLike[str],
    formats: Sequence[str] = registry.DEFAULT,
    precisions: Sequence[str] = PRECISIONS,
    *,
    calibration: Data | None = None,
    evaluation: Data | None = None,
    max_drop: float | None = 0.01,
    metrics: object = None,
    objective: str = "size",
    mixed: bool = True,
    sparse: bool = False,
    batch: int | None = None,
    targets: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    normalization: object = None,
    history: dict[str, Sequence[float]] | None = None,
    teacher: object = None,
    opset: int = 17,
    allow_flex: bool = False,
    name: str = "model",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Export a Keras model to TFLite and ONNX files, run each, and say which one to take.

    Every file is loaded in its own runtime (LiteRT, ONNX Runtime), compared with the Keras model on
    the evaluation data, timed and weighed. The folder receives the files, `manifest.json` and
    `evaluation.npz` with the samples that `verify` reruns. A file that cannot be made or fails its
    check is reported with the reason; the others are made all the same.

    Conversion runs in processes of its own on the TensorFlow backend, so a converter that crashes
    does no harm, and models trained on JAX or PyTorch are exported too. Classes of your own must
    then be importable from a module.

    Args:
        model: A built `keras.Model`.
        folder: Where the files go. It is made if missing, and must be empty without `overwrite`.
        formats: Any of `"tflite"`, `"onnx"`, and those that `formats.registry.register` knows.
        precisions: Any of `"float32"`; `"float16"` (weights); `"dynamic"` (int8 weights,
            activations quantized while running); `"weight_int8"` (int8 weights, float arithmetic;
            TFLite); `"weight_int4"`; `"int8"` (weights and activations); `"uint8"` (the same
            with unsigned bytes at the borders, which MediaPipe takes; TFLite); `"int16x8"` (int16
            activations; TFLite); `"int8_qoperator"` (int8 as integer operators instead of quantize
            and dequantize pairs; ONNX). One that exists in a single format is made in that one.
        calibration: Inputs that stand for the real ones, for int8: an array `(samples, ...)`, a
            dict of them by input name, `(x, y)`, or a `tf.data.Dataset`, `PyDataset` or generator
            of batches. At most 512 samples are used.
        evaluation: `(x, y)`, `(x, y, sample_weight)`, `x` alone, or a dataset of batches of these.
            `y` holds class indices, one-hot rows, 0/1 values or regression targets. All figures are
            weighted by the sample weights; what weighs 0, is masked by Keras, or has the
            `ignore_class` of the compiled loss counts nowhere, and a row of class -1 has no label.
            Without `evaluation` the calibration inputs serve for comparison with the Keras model.
        max_drop: Accuracy that a file may lose against the Keras model, as a share (0.01 is one
            point), at each output; or of the first of the `metrics` there. Behind an accuracy that
            is kept, AUC may fall by five times that (two points at least), and no class may lose
            half of the rows that were found. At an output without labels, the share of decisions it
            may change, which bounds that loss; outputs that make no decisions must keep 20 dB of
            signal over noise. Without labels, classes are known by class names (`labels`), by the
            loss that the model was compiled with, or by a softmax; other rows of numbers must pass
            both checks. `None` sets no limit, but for files that are of no use at all: constant
            answers, or more noise than signal.
        metrics: What files are judged by in place of accuracy, and what is reported: names
            (`"auc"`, `"macro_f1"`, `"balanced_accuracy"`, `"mae"`, `"rmse"`, `"spearman"`,
            `"ndcg@10"`, or those of Keras), `keras.metrics.Metric` objects, or functions of
            `(labels, outputs)` that take `sample_weight` or give one value a row where there are
            weights; one, a list, or for several outputs a dict or list by output. `max_drop`
            acts on the first of each output: where more is better, the value may fall by `max_drop`
            (of itself where it is above 1); where less is, as for errors, rise by that share of the
            Keras model's. The direction is Keras's own or follows the name, or is said by
            `(metric, "max")` or `(metric, "min")`.
        objective: `"size"` or `"latency"`: what the best file has least of.
        mixed: Whether to try, where int8 loses more than `max_drop`, a file in which the layers
            that lose most of the signal stay float (`"mixed"` in the report).
        sparse: Whether TFLite files may store their weights without the zeros, of which pruned
            models have many: where the file gets at least 5 % smaller, runs, and answers the same.
            LiteRT and TensorFlow Lite run such files; most others, among them OpenVINO, Ethos-U
            and TensorFlow Lite for Microcontrollers, refuse them.
        batch: `None` leaves the batch size free where the format can, 1 fixes it: some compilers
            and runtimes take only such files.
        targets: Names of runtimes, such as `"tflite-2.14"` or `"ethos-u55"`, that the best file
            must run in; see `runtimes.NAMES`. The report says what was given up for them.
        labels: Names of the classes of the first output, for the report, the manifest and the files
            themselves (TFLite metadata, ONNX `metadata_props`).
        normalization: `(mean, std)`, numbers or one for each channel, if the input is an image: how
            pixels 0..255 become the model's input, `(pixel - mean) / std`. It is written into the
            files, where MediaPipe reads it. With several image inputs, a dict by input name.
        history: `History.history` of the training, for the curves in the HTML report: for each
            name a list with one number an epoch.
        teacher: A Keras model to show as reference, or a dict of its figures (`accuracy`,
            `parameters`, `bytes`, `latency_ms`).
        opset: ONNX operator set, 13 to 18.
        allow_flex: Whether TFLite files may hold TensorFlow operators, which need the Flex
            delegate.
        name: First part of the file names.
        overwrite: Whether to write into a folder that is not empty. Earlier files are replaced only
            when the new ones are complete; files of other origin stay.
        progress: Called as `progress(stage, done, total)`.

    Returns:
        The report.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument, the model or the data cannot be used. Nothing is written then.
        FileExistsError: If the folder is not empty and `overwrite` is not given, if another export
            is writing it, or if it holds the `manifest.json` of something else, such as a cache.
        OSError: If the folder cannot be written, or the disk is full. Nothing is left behind.
        ImportError: If a package of the extra `export` is missing.

    Examples:
        >>> report = keras_kd.export(  # doctest: +SKIP
        ...     student, "exported/digits", calibration=x_cal, evaluation=(x_val, y_val)
        ... )
        >>> report.best.path  # doctest: +SKIP
    """
    arguments.check_path(folder)
    arguments.check_progress(progress)
    arguments.check_switches(mixed=mixed, sparse=sparse, allow_flex=allow_flex, overwrite=overwrite)
    tell = progress or (lambda stage, done, total: None)
    target = Path(folder)
    asked = checks.asked(
        target,
        formats,
        precisions,
        name=name,
        overwrite=overwrite,
        max_drop=max_drop,
        objective=objective,
        opset=opset,
        batch=batch,
        targets=targets,
    )
    formats, precisions, wanted = asked.formats, asked.precisions, asked.targets
    class_names = arguments.check_labels(labels)
    curves = arguments.read_history(history)
    check_teacher(teacher)
    checks.check_model(model)
    arguments.check_texts("The name of the model or of a layer", [model.name, *layer_names(model)])
    quantization_aware = checks.check_quantization_aware(model)
    check_arguments(model, class_names, normalization, metrics)
    checks.check_data_given(calibration, evaluation, precisions, quantization_aware)
    # The converter imports TensorFlow while the Keras model runs.
    warm.prepare("convert")

    several = not is_symbolic(model) or len(model.inputs) > 1
    calibrating = (
        None
        if calibration is None
        else data.read(
            calibration, "calibration", several_inputs=several, limit=CALIBRATION_SAMPLES
        )
    )
    samples = (
        calibrating
        if evaluation is None and calibrating is not None
        else data.read(evaluation, "evaluation", several_inputs=several)
    )
    tell("reference", 0, 1)
    reference = answer(
        model,
        samples.x,
        None if evaluation is None else samples.y,
        None if evaluation is None else samples.weights,
        # One name may be that of a number.
        classes=class_names if class_names and len(class_names) > 1 else None,
        chosen=metrics,
        judges=max_drop is not None,
    )
    check_class_names(class_names, reference)
    pixels = read_normalization(normalization, reference.signature)
    calibrated = None
    if calibrating is not None:
        calibrated = data.by_name(calibrating.x, reference.signature, "calibration")
        data.check_same_scale(calibrated, reference.inputs)
    teacher_row = teacher_figures(teacher, samples.x, reference)
    tell("reference", 1, 1)

    with staging(target) as stage, working_folder() as temporary:
        tasks = [
            ConvertTask(
                f"{fmt.name}-{precision}",
                fmt.name,
                precision,
                str(stage / f"{name}_{precision}{fmt.suffixes[0]}"),
            )
            for fmt in map(registry.get, formats)
            for precision in precisions
            if precision in fmt.precisions
        ]
        used = manifest.versions()
        about = {
            "name": model.name,
            "signature": reference.signature.to_dict(),
            "labels": class_names,
            "normalization": pixels,
            "ranges": _ranges(reference.inputs if calibrated is None else calibrated)["ranges"],
            "versions": {key: used[key] for key in ("keras-kd", "keras") if key in used},
        }
        options = {
            "allow_flex": allow_flex,
            "opset": opset,
            "batch": batch,
            "quantized": quantization_aware,
            "about": about,
        }
        work = _Work(
            model,
            reference,
            calibrated,
            temporary,
            options,
            tell,
            sparse=sparse,
            objective=objective,
            targets=wanted,
        )

        def judge(rows: Sequence[ArtifactRow]) -> list[ArtifactRow]:
            return acceptance.judge(
                rows,
                max_drop,
                quantization_aware,
                reference.figures.outputs,
                Causes(reference.inputs, reference.outputs, work.names, work.layers),
                # A single name is that of the yes, and no list of classes.
                {reference.signature.outputs[0].name: class_names}
                if class_names and len(class_names) > 1
                else {},
            )

        def mixed_path(fmt: Format) -> str:
            return str(stage / f"{name}_mixed{fmt.suffixes[0]}")

        rows = judge(work.make(tasks))
        if mixed:
            rows = try_mixed(work, rows, judge, mixed_path, quantization_aware)
        arrays = {key: array[: reference.stored] for key, array in reference.arrays().items()}
        np.savez_compressed(stage / "evaluation.npz", **arrays)
        content = {
            "schema": manifest.VERSION,
            "model": {
                "name": model.name,
                "parameters": reference.figures.parameters,
                **reference.signature.to_dict(),
                "labels": class_names,
                "normalization": pixels,
                "quantization_aware": quantization_aware,
            },
            "keras": to_json(reference.figures),
            "teacher": teacher_row,
            "settings": {
                "max_drop": max_drop,
                "objective": objective,
                "opset": opset,
                "batch": batch,
                "sparse": sparse,
                "targets": wanted,
            },
            "evaluation": {
                "samples": reference.count,
                "labeled": bool(reference.labels),
                "kinds": reference.kinds,
                "metrics": {
                    name: [each.to_list() for each in chosen]
                    for name, chosen in reference.chosen.items()
                },
                "weighted": sorted(reference.weights),
                "file": "evaluation.npz",
                "stored": reference.stored,
                "sha256": manifest.digest(stage / "evaluation.npz"),
            },
            "calibration": None if calibrated is None else _ranges(calibrated),
            "artifacts": [row.to_json() for row in rows],
            "layers": {fmt: to_json(found) for fmt, found in work.layers.items()},
            **acceptance.choice(rows, objective, wanted),
            "history": curves,
            "versions": used,
        }
        # Whoever reads it later will ask the same.
        manifest.check(content, target)
        tell("write", 0, 1)
        place(stage, target, content, overwrite=overwrite)
        tell("write", 1, 1)
    return Report(target, manifest.read(target))


class _Work:
    """One model on its way to files: what conversion and measurement share.

    `names` are those of the model's layers, `layers` the noise of each by format.
    """

    def __init__(
        self,
        model: keras.Model,
        reference: Reference,
        calibrated: Arrays | None,
        scratch: Path,
        options: dict[str, Any],
        tell: Progress,
        *,
        sparse: bool,
        objective: str,
        targets: list[str],
    ) -> None:
        self._sparse = sparse
        self._objective = objective
        self._model = model
        self._signature = reference.signature
        self._scratch = scratch
        self._tell = tell
        self._rounds = 0
        arrays = reference.arrays()
        np.savez(scratch / "evaluation.npz", **arrays)
        np.savez(scratch / "sample.npz", **{key: array[:4] for key, array in arrays.items()})
        if calibrated is not None:
            inputs = enumerate(self._signature.inputs)
            np.savez(
                scratch / "calibration.npz",
                **{f"x{i}": calibrated[info.name] for i, info in inputs},
            )
        self._reference = reference
        self.names = layer_names(model)
        expected = (reference.figures.latency_ms or 0.0) * 1e-3
        common = {"signature": self._signature.to_dict(), "layers": self.names}
        self._conversion = {
            **options,
            **common,
            "expected": expected * CALIBRATION_SAMPLES,
            "shapes": reference.shapes,
            "sample": str(scratch / "sample.npz"),
            "calibration": None if calibrated is None else str(scratch / "calibration.npz"),
        }
        self._measurement = {
            **common,
            "evaluation": str(scratch / "evaluation.npz"),
            "expected": expected * reference.count,
            "kinds": reference.kinds,
            "stored": reference.stored,
            "threads": 1,
            "time": TIMED,
            "targets": targets,
            "images": sorted(options["about"]["normalization"]),
        }
        self.layers: dict[str, tuple[LayerRow, ...]] = {}

    def make(self, tasks: Sequence[ConvertTask]) -> list[ArtifactRow]:
        """Convert and measure; the returned rows say what came of it."""
        self._rounds += 1
        scratch = self._scratch / str(self._rounds)
        scratch.mkdir()
        if self._sparse:
            tasks = [
                replace(task, compact=_beside(task.path))
                if registry.get(task.format).compacts
                else task
                for task in tasks
            ]

        def measuring(task: ConvertTask, converted: Converted) -> MeasureTask:
            return MeasureTask(
                task.id,
                task.format,
                task.path,
                others=converted.files[1:],
                outputs=str(scratch / f"{task.id}.npz") if self._reference.chosen else "",
                full=converted.full,
            )

        with jobs.Measuring(self._measurement, scratch, measuring) as early:
            converted = jobs.convert(
                self._model, self._signature, tasks, scratch, self._conversion, self._tell, early
            )
            made = {
                task.id: measuring(task, found)
                for task in tasks
                if isinstance(found := converted[task.id], Converted)
            }
            # A task of its own: if such a file brings the runtime down, the one with zeros stays.
            smaller = [
                MeasureTask(f"{task.id}-sparse", task.format, task.compact, dense=task.path)
                for task in tasks
                if isinstance(found := converted[task.id], Converted) and found.sparsity is not None
            ]
            noise = [
                NoiseTask(f"layers-{fmt}", fmt, made[f"{fmt}-int8"].path, made[float32].path)
                for fmt in registry.names()
                if f"{fmt}-int8" in made and (float32 := f"{fmt}-float32") in made
            ]
            measured = jobs.measure(
                [*made.values(), *smaller, *noise], self._measurement, scratch, self._tell, early
            )
        for each in noise:
            self.layers[each.format] = _layers(measured, each.id)
        return [self._row(task, converted[task.id], measured, made.get(task.id)) for task in tasks]

    def _row(
        self,
        task: ConvertTask,
        converted: Converted | Failure,
        measured: jobs.Measurements,
        made: MeasureTask | None,
    ) -> ArtifactRow:
        """One artifact, with the hashes of its files."""
        row = jobs.artifact(task, converted, measured.files.get(task.id))
        path = Path(task.path)
        paths = [path, *(path.with_suffix(s) for s in registry.get(task.format).suffixes[1:])]
        if row.measured is None or isinstance(converted, Failure) or made is None:
            # A file that does not even load is of no use to anybody.
            for each in paths:
                each.unlink(missing_ok=True)
            return row
        if converted.sparsity is not None:
            found = measured.files[f"{task.id}-sparse"]
            row = self._without_zeros(row, row.measured, task, converted.sparsity, found)
        if made.outputs and row.measured is not None:
            judged, note = with_chosen(row.measured, Path(made.outputs), self._reference)
            row = replace(row, measured=judged, notes=(*row.notes, note) if note else row.notes)
        files = [path.with_name(name) for name in converted.files]
        return replace(
            row,
            files=tuple(
                FileRow(each.name, manifest.digest(each), each.stat().st_size) for each in files
            ),
        )

    def compare_layers(self, row: ArtifactRow, stage: Path) -> None:
        """Measure the noise of an int8 file's layers against a float32 file made for it alone."""
        self._rounds += 1
        scratch = self._scratch / str(self._rounds)
        scratch.mkdir()
        suffix = registry.get(row.format).suffixes[0]
        full = ConvertTask(
            f"{row.format}-float32", row.format, "float32", str(scratch / f"float32{suffix}")
        )
        converted = jobs.convert(
            self._model, self._signature, [full], scratch, self._conversion, quietly
        )
        if isinstance(converted[full.id], Failure) or row.file is None:
            return
        noise = NoiseTask(f"layers-{row.format}", row.format, str(stage / row.file), full.path)
        measured = jobs.measure([noise], self._measurement, scratch, quietly)
        self.layers[row.format] = _layers(measured, noise.id)

    def _without_zeros(
        self,
        row: ArtifactRow,
        dense: Measured,
        task: ConvertTask,
        sparsity: float,
        found: Measured | Failure,
    ) -> ArtifactRow:
        """Put the form of a file without zeros in its place, if nothing speaks against it."""
        reason = acceptance.refusal(dense, found, self._objective)
        if reason or isinstance(found, Failure):
            share = f"{100 * sparsity:.0f} %"
            note = f"its weights, {share} of them zeros, are stored whole: {reason}"
            return replace(row, notes=(*row.notes, note))
        os.replace(task.compact, task.path)
        return replace(
            row,
            measured=found,
            sparsity=sparsity,
            dense=Dense(
                dense.bytes,
                dense.gzip_bytes,
                dense.latency_ms or 0.0,
                dense.latency_low_ms or 0.0,
                1.0 if found.against is None else found.against.slowdown,
            ),
        )


def _layers(measured: jobs.Measurements, name: str) -> tuple[LayerRow, ...]:
    found = measured.noise.get(name)
    return () if found is None else found.layers


def _beside(path: str) -> str:
    # Hidden, so that it is not put in place with the others.
    return str(Path(path).with_name(f".sparse-{Path(path).name}"))


def _ranges(calibrated: Arrays) -> dict[str, Any]:
    return {
        "samples": len(next(iter(calibrated.values()))),
        "ranges": {
            name: [float(array.min()), float(array.max())] for name, array in calibrated.items()
        },
    }
