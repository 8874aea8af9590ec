"""The whole way of one export: check, convert, verify, weigh, choose, put in place."""

from __future__ import annotations

import difflib
import errno
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from . import data, manifest, metrics
from .handover import save_keras, save_tensorflow
from .process import run_tasks
from .report import Report
from .signature import Arrays, Signature, describe, is_symbolic

Progress = Callable[[str, int, int], None]

FORMATS = ("tflite", "onnx")
PRECISIONS = ("float32", "float16", "dynamic", "int8")

_OPSETS = range(13, 19)

# Largest difference from the Keras model over the largest output, and lowest SQNR in dB, that
# rounding explains. A lost activation or a misread weight lies far beyond.
_TOLERANCE = {"float32": (1e-3, 60.0), "float16": (3e-2, 35.0)}

# Regression has no accuracy to lose: its files must keep a tenth of the signal's amplitude.
_LEAST_SQNR = 20.0

_SLOWER = 1.25
_STORED_SAMPLES = 256
_STORED_BYTES = 4_000_000


def export_model(
    model: Any,
    folder: str | os.PathLike[str],
    formats: Sequence[str] = FORMATS,
    precisions: Sequence[str] = PRECISIONS,
    *,
    calibration: Any = None,
    evaluation: Any = None,
    max_drop: float | None = 0.01,
    objective: str = "size",
    labels: Sequence[str] | None = None,
    history: dict[str, Sequence[float]] | None = None,
    teacher: Any = None,
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
    does no harm, and models trained on JAX or PyTorch are exported too. Classes of your own must then
    be importable from a module.

    Args:
        model: A built `keras.Model`.
        folder: Where the files go. It is made if missing, and must be empty without `overwrite`.
        formats: Any of `"tflite"`, `"onnx"`.
        precisions: Any of `"float32"`, `"float16"` (weights), `"dynamic"` (int8 weights, float
            activations), `"int8"` (weights and activations).
        calibration: Inputs that stand for the real ones, for int8: an array `(samples, ...)`, a dict
            of them by input name, `(x, y)`, or a `tf.data.Dataset`, `PyDataset` or generator of
            batches. At most 512 samples are used.
        evaluation: `(x, y)`, `x` alone, or a dataset of batches. `y` holds class indices, one-hot
            rows, 0/1 values or regression targets. Without it the calibration inputs serve for
            comparison with the Keras model.
        max_drop: Accuracy that a file may lose against the Keras model, as a share (0.01 is one
            point). Without labels, the share of decisions it may change, which bounds that loss.
            `None` sets no limit.
        objective: `"size"` or `"latency"`: what the best file has least of.
        labels: Names of the classes, for the report and the manifest.
        history: `History.history` of the training, for the curves in the HTML report.
        teacher: A Keras model to show as reference, or a dict of its figures (`accuracy`,
            `parameters`, `bytes`, `latency_ms`).
        opset: ONNX operator set, 13 to 18.
        allow_flex: Whether TFLite files may hold TensorFlow operators, which need the Flex delegate.
        name: First part of the file names.
        overwrite: Whether to write into a folder that is not empty. Earlier files are replaced only
            when the new ones are complete; files of other origin stay.
        progress: Called as `progress(stage, done, total)`.

    Returns:
        The report.

    Raises:
        ValueError: If an argument, the model or the data cannot be used. Nothing is written then.
        FileExistsError: If the folder is not empty and `overwrite` is not given.
        OSError: If the folder cannot be written, or the disk is full. Nothing is left behind.
        ImportError: If a package of the extra `export` is missing.

    Example:
        >>> report = keras_kd.export(  # doctest: +SKIP
        ...     student, "exported/digits", calibration=x_cal, evaluation=(x_val, y_val)
        ... )
        >>> report.best.path  # doctest: +SKIP
    """
    tell = progress or (lambda stage, done, total: None)
    formats = _names("formats", formats, FORMATS)
    precisions = _names("precisions", precisions, PRECISIONS)
    _check_settings(max_drop, objective, opset, name)
    _check_packages(formats)
    target = Path(folder)
    check_folder(target, overwrite)
    _check_model(model)
    quantized = _is_quantized(model)
    if calibration is None and "int8" in precisions and not quantized:
        raise ValueError(
            "`int8` needs calibration data, and none was given. Pass `calibration=x` with a few "
            "hundred typical inputs, or leave int8 out of `precisions`."
        )
    if evaluation is None and calibration is None:
        raise ValueError(
            "No data was given to verify the files with. Pass `evaluation=(x, y)`, or `evaluation=x` "
            "without labels."
        )

    several = not is_symbolic(model) or len(model.inputs) > 1
    calibrating = (
        None
        if calibration is None
        else data.read(
            calibration, "calibration", several_inputs=several, limit=data.CALIBRATION_SAMPLES
        )
    )
    samples = (
        calibrating
        if evaluation is None and calibrating is not None
        else data.read(evaluation, "evaluation", several_inputs=several)
    )
    tell("reference", 0, 1)
    signature, inputs, references = _reference(model, samples.x)
    targets = _targets(samples.y if evaluation is not None else None, signature)
    kinds = {
        info.name: {
            "kind": metrics.kind_of(references[info.name], targets.get(info.name)),
            "probabilities": metrics.is_probability(references[info.name]),
        }
        for info in signature.outputs
    }
    _check_labels(labels, signature, references)
    calibrated = None
    if calibrating is not None:
        calibrated = data.by_name(calibrating.x, signature, "calibration")
        data.check_same_scale(calibrated, inputs)
    own = metrics.compare(references, references, targets, kinds)
    one = _nest(signature, {key: x[:1] for key, x in inputs.items()}, model)
    keras_row = {
        "accuracy": own["accuracy"],
        "parameters": int(model.count_params()),
        "bytes": int(sum(np.prod(w.shape) * 4 for w in model.weights)),
        "latency_ms": _keras_latency(model, one),
    }
    teacher_row = _teacher(teacher, samples, targets, kinds, signature)
    tell("reference", 1, 1)

    stored = _stored_count(inputs)
    with _staging(target) as stage, tempfile.TemporaryDirectory(prefix="keras-kd-") as temporary:
        scratch = Path(temporary)
        arrays = _numbered(signature, inputs, references, targets)
        np.savez(scratch / "evaluation.npz", **arrays)
        np.savez(scratch / "sample.npz", **{key: x[:4] for key, x in arrays.items()})
        if calibrated is not None:
            np.savez(
                scratch / "calibration.npz",
                **{f"x{i}": calibrated[info.name] for i, info in enumerate(signature.inputs)},
            )
        shapes = [[1, *inputs[info.name].shape[1:]] for info in signature.inputs]
        tasks = [
            {
                "id": f"{fmt}-{precision}",
                "format": fmt,
                "precision": precision,
                "path": str(stage / f"{name}_{precision}.{fmt}"),
            }
            for fmt in formats
            for precision in precisions
        ]
        converted = _convert(
            model,
            signature,
            tasks,
            scratch,
            {
                "shapes": shapes,
                "sample": str(scratch / "sample.npz"),
                "calibration": None if calibrated is None else str(scratch / "calibration.npz"),
                "allow_flex": allow_flex,
                "opset": opset,
                "signature": signature.to_dict(),
            },
            tell,
        )
        measured = measure(
            [task for task in tasks if "error" not in converted[task["id"]]],
            {
                "signature": signature.to_dict(),
                "evaluation": str(scratch / "evaluation.npz"),
                "kinds": kinds,
                "stored": stored,
                "threads": 1,
                "time": True,
            },
            scratch,
            tell,
        )
        rows = [_row(task, converted[task["id"]], measured.get(task["id"])) for task in tasks]
        _judge(rows, keras_row, max_drop)
        for row in rows:
            path = stage / f"{name}_{row['precision']}.{row['format']}"
            if row["bytes"] is not None:
                row["file"], row["sha256"] = path.name, manifest.digest(path)
            elif path.exists():
                # A file that does not even load is of no use to anybody.
                path.unlink()
        kept = {key: x[:stored] for key, x in arrays.items()}
        np.savez_compressed(stage / "evaluation.npz", **kept)
        content = {
            "schema": manifest.VERSION,
            "model": {
                "name": model.name,
                "parameters": keras_row["parameters"],
                **{key: value for key, value in signature.to_dict().items()},
                "labels": None if labels is None else [str(label) for label in labels],
                "quantization_aware": quantized,
            },
            "keras": keras_row,
            "teacher": teacher_row,
            "settings": {"max_drop": max_drop, "objective": objective, "opset": opset},
            "evaluation": {
                "samples": samples.count,
                "labeled": bool(targets),
                "kinds": kinds,
                "file": "evaluation.npz",
                "stored": stored,
                "sha256": manifest.digest(stage / "evaluation.npz"),
            },
            "calibration": None if calibrated is None else _ranges(calibrated),
            "artifacts": rows,
            "best": _best(rows, objective),
            "history": None if history is None else _curves(history),
            "versions": manifest.versions(),
        }
        manifest.write(content, stage / manifest.FILE)
        tell("write", 0, 1)
        _place(stage, target)
        tell("write", 1, 1)
    return Report(target, manifest.read(target))


def check_folder(target: Path, overwrite: bool) -> None:
    """Refuse a folder that cannot be written to, or is not empty, before any work.

    Args:
        target: The folder, which may not exist yet.
        overwrite: Whether it may hold files.

    Raises:
        FileExistsError: If it is not empty.
        NotADirectoryError: If it, or what it would lie in, is a file.
        PermissionError: If it cannot be written to.
    """
    existing = target
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(
            f"`{existing}` is a file, so nothing can be exported to `{target}`. Choose a folder."
        )
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(
            f"The folder `{target}` is not empty. Choose another one, or pass `overwrite=True` "
            "(`--overwrite` on the command line) to replace an earlier export."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(
            f"The folder `{existing}` cannot be written to. Choose another one or change its "
            "permissions."
        )


def _names(what: str, values: Sequence[str], known: Sequence[str]) -> list[str]:
    names = [values] if isinstance(values, str) else list(values)
    if not names:
        raise ValueError(f"`{what}` is empty. Pass at least one of {list(known)}.")
    for value in names:
        if value not in known:
            close = difflib.get_close_matches(str(value), known, 1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"`{value}` is none of the {what} {list(known)}.{hint}")
    return list(dict.fromkeys(names))


def _check_settings(max_drop: float | None, objective: str, opset: int, name: str) -> None:
    if max_drop is not None and not 0 <= max_drop <= 1:
        raise ValueError(
            f"`max_drop` must lie in [0, 1], as a share of the samples, or be None. "
            f"Received: max_drop={max_drop!r}; one point of accuracy is 0.01."
        )
    _names("objective", objective, ("size", "latency"))
    if opset not in _OPSETS:
        raise ValueError(
            f"`opset` must lie in {_OPSETS[0]}..{_OPSETS[-1]}, the range that tf2onnx writes. "
            f"Received: opset={opset!r}."
        )
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(
            f"`name` is the first part of a file name, without folders. Received: name={name!r}."
        )


def _check_packages(formats: Sequence[str]) -> None:
    needed = ["tensorflow"]
    if "tflite" in formats:
        needed += ["ai_edge_litert"]
    if "onnx" in formats:
        needed += ["onnx", "onnxruntime", "tf2onnx"]
    missing = [package for package in needed if find_spec(package) is None]
    if missing:
        raise ImportError(
            f"Export to {', '.join(formats)} needs {', '.join(missing)}, which is not installed. "
            'Install it with `pip install "keras_kd[export]"`.'
        )


def _check_model(model: Any) -> None:
    import keras

    if not isinstance(model, keras.Model):
        kind = f"{type(model).__module__}.{type(model).__name__}"
        hint = (
            " It is a Keras 2 model: rebuild it with Keras 3 and copy the weights."
            if kind.startswith("tf_keras")
            else " From a Distiller, pass `distiller.student`."
        )
        raise TypeError(f"`model` must be a `keras.Model`. Received: {kind}.{hint}")
    if not model.built:
        raise ValueError(
            f"The model `{model.name}` is not built, so it has no weights to export. Call it on one "
            "batch first."
        )


def _is_quantized(model: Any) -> bool:
    # Asked before the work starts, since such a model needs no calibration data.
    import json

    import keras

    try:
        config = json.dumps(keras.saving.serialize_keras_object(model), default=str)
    except Exception:
        # A model that cannot be serialized is traced as it is; see `_convert`.
        return False
    return '"keras_kd.compress' in config


def _reference(model: Any, x: Any) -> tuple[Signature, Arrays, Arrays]:
    import keras

    if is_symbolic(model):
        # The graph declares its inputs, so the data is checked before the model sees it.
        draft = describe(model, x, [_empty(tensor) for tensor in model.outputs])
        inputs = data.by_name(x, draft, "evaluation")
        outputs = model.predict(_nest(draft, inputs, model), batch_size=256, verbose=0)
        signature = describe(model, x, outputs)
    else:
        outputs = model.predict(x, batch_size=256, verbose=0)
        signature = describe(model, x, outputs)
        inputs = data.by_name(x, signature, "evaluation")
    references = {
        info.name: np.ascontiguousarray(np.asarray(array), np.float32)
        if info.dtype == "float32"
        else np.asarray(array)
        for info, array in zip(signature.outputs, keras.tree.flatten(outputs), strict=True)
    }
    for output, array in references.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(
                f"The Keras model itself gives NaN or infinite values at output `{output}` on the "
                "evaluation data. Mend the model before exporting it."
            )
    return signature, inputs, references


def _empty(tensor: Any) -> np.ndarray:
    dtype = str(tensor.dtype)
    shape = [1 if size is None else size for size in tensor.shape]
    return np.zeros(shape, np.float32 if "float" in dtype else dtype)


def _nest(signature: Signature, arrays: Arrays, model: Any) -> Any:
    from .signature import pack

    return pack(model, signature, [arrays[info.name] for info in signature.inputs])


def _targets(y: Any, signature: Signature) -> dict[str, np.ndarray]:
    if y is None:
        return {}
    names = [info.name for info in signature.outputs]
    if isinstance(y, dict):
        unknown = sorted(set(y) - set(names))
        if unknown:
            raise ValueError(
                f"The evaluation labels name the outputs {unknown}, which the model does not have; "
                f"its outputs are {names}."
            )
        rows = dict(y)
    elif isinstance(y, (list, tuple)) and len(names) > 1:
        if len(y) != len(names):
            raise ValueError(
                f"The evaluation labels are {len(y)} arrays, the model has the {len(names)} outputs "
                f"{names}. Pass a dict by output name to label only some."
            )
        rows = dict(zip(names, y, strict=True))
    elif len(names) > 1:
        raise ValueError(
            f"One array of evaluation labels was given, the model has the outputs {names}. Pass a "
            "dict by output name."
        )
    else:
        rows = {names[0]: y}
    result = {}
    for name, value in rows.items():
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise ValueError(
                f"The evaluation labels for output `{name}` have dtype {array.dtype}; class indices "
                "or numbers are needed."
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(
                f"The evaluation labels for output `{name}` hold NaN or infinite values."
            )
        result[name] = array
    return result


def _check_labels(labels: Sequence[str] | None, signature: Signature, references: Arrays) -> None:
    if labels is None:
        return
    first = references[signature.outputs[0].name]
    units = first.shape[-1]
    if isinstance(labels, str) or len(labels) not in ({units} if units > 1 else {1, 2}):
        raise ValueError(
            f"`labels` must name the {units} classes of output `{signature.outputs[0].name}`. "
            f"Received: {labels!r}."
        )


def _keras_latency(model: Any, one: Any) -> float:
    from .benchmark import time_calls

    return float(np.median(time_calls(lambda: model.predict_on_batch(one)))) * 1e3


def _teacher(
    teacher: Any,
    samples: data.Samples,
    targets: dict[str, np.ndarray],
    kinds: dict[str, dict[str, Any]],
    signature: Signature,
) -> dict[str, Any] | None:
    if teacher is None:
        return None
    if isinstance(teacher, dict):
        known = ("accuracy", "parameters", "bytes", "latency_ms")
        _names("figures of `teacher`", list(teacher), known)
        return {key: teacher[key] for key in known if teacher.get(key) is not None}
    _check_model(teacher)
    import keras

    outputs = keras.tree.flatten(teacher.predict(samples.x, batch_size=256, verbose=0))
    accuracies = [
        metrics.accuracy(
            np.asarray(array, np.float32),
            targets.get(info.name),
            kinds[info.name]["kind"],
            metrics.is_probability(np.asarray(array, np.float32)),
        )
        for info, array in zip(signature.outputs, outputs, strict=False)
    ]
    known_ones = [value for value in accuracies if value is not None]
    one = keras.tree.map_structure(lambda array: array[:1], samples.x)
    return {
        "accuracy": sum(known_ones) / len(known_ones) if known_ones else None,
        "parameters": int(teacher.count_params()),
        "bytes": int(sum(np.prod(w.shape) * 4 for w in teacher.weights)),
        "latency_ms": _keras_latency(teacher, one),
    }


def _stored_count(inputs: Arrays) -> int:
    each = sum(array[:1].nbytes for array in inputs.values())
    count = len(next(iter(inputs.values())))
    return int(min(count, _STORED_SAMPLES, max(8, _STORED_BYTES // max(each, 1))))


def _numbered(
    signature: Signature, inputs: Arrays, references: Arrays, targets: dict[str, np.ndarray]
) -> Arrays:
    # Names of tensors may hold characters that are no file names in an archive.
    arrays = {f"x{i}": inputs[info.name] for i, info in enumerate(signature.inputs)}
    for i, info in enumerate(signature.outputs):
        arrays[f"y{i}"] = references[info.name]
        if info.name in targets:
            arrays[f"t{i}"] = targets[info.name]
    return arrays


def _convert(
    model: Any,
    signature: Signature,
    tasks: list[dict[str, Any]],
    scratch: Path,
    job: dict[str, Any],
    tell: Progress,
) -> dict[str, dict[str, Any]]:
    import keras

    finished: set[str] = set()

    def done(task: dict[str, Any]) -> None:
        finished.add(task["id"])
        tell("convert", len(finished), len(tasks))

    tell("convert", 0, len(tasks))
    reason = ""
    try:
        needs = save_keras(model, scratch / "model.keras")
    except ValueError as error:
        reason = str(error)
    else:
        first = {
            **job,
            "kind": "convert",
            "handover": "keras",
            "model": str(scratch / "model.keras"),
            "needs": needs,
            "scratch": str(scratch / "convert"),
        }
        results = run_tasks(first, tasks, scratch / "jobs", done=done)
        if any(result.get("started", True) for result in results.values()):
            return _raise_disk(results)
        # The model never arrived in the other process; its own process may still trace it.
        reason = next(iter(results.values()))["error"]
        finished.clear()
    if keras.backend.backend() != "tensorflow":
        message = (
            f"the model cannot be handed to the converter: {reason}. Define its classes in a module "
            "that can be imported, registered with `keras.saving.register_keras_serializable`"
        )
        return {task["id"]: {"error": message, "crashed": False} for task in tasks}
    try:
        save_tensorflow(model, signature, job["shapes"], scratch / "traced")
    except OSError:
        raise
    except Exception as error:
        message = f"the model cannot be traced: {type(error).__name__}: {str(error)[:300]}"
        return {task["id"]: {"error": message, "crashed": False} for task in tasks}
    second = {
        **job,
        "kind": "convert",
        "handover": "savedmodel",
        "model": str(scratch / "traced"),
        "needs": {"modules": [], "classes": []},
        "scratch": str(scratch / "convert-traced"),
    }
    return _raise_disk(run_tasks(second, tasks, scratch / "jobs-traced", done=done))


def measure(
    tasks: list[dict[str, Any]], job: dict[str, Any], scratch: Path, tell: Progress
) -> dict[str, dict[str, Any]]:
    """Run files in their runtimes, in a process of their own.

    Args:
        tasks: `id` and `path` of each file.
        job: See `measure.Measurer`.
        scratch: Folder for the job.
        tell: Progress callback.

    Returns:
        For each id what was measured, or `{"error": ...}`.
    """
    finished = 0

    def done(_: dict[str, Any]) -> None:
        nonlocal finished
        finished += 1
        tell("verify", finished, len(tasks))

    tell("verify", 0, len(tasks))
    return _raise_disk(run_tasks({**job, "kind": "measure"}, tasks, scratch / "measure", done=done))


def _raise_disk(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for result in results.values():
        if result.get("errno") in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(result["errno"], os.strerror(result["errno"]))
    return results


def _row(
    task: dict[str, Any], converted: dict[str, Any], measured: dict[str, Any] | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "format": task["format"],
        "precision": task["precision"],
        "status": "passed",
        "stage": None,
        "reason": "",
        "flags": list(converted.get("notes", [])),
        "file": None,
        "bytes": None,
        "batch": converted.get("batch"),
    }
    failed = None
    if "error" in converted:
        failed = ("convert", converted["error"])
    elif measured is None or "error" in measured:
        failed = ("verify", (measured or {}).get("error", "it was not measured"))
    if failed is not None:
        row.update(status="failed", stage=failed[0], reason=failed[1])
    elif measured is not None:
        row.update({key: value for key, value in measured.items() if key != "seconds"})
    return row


def _judge(rows: list[dict[str, Any]], reference: dict[str, Any], max_drop: float | None) -> None:
    floats = {row["format"]: row for row in rows if row["precision"] == "float32" and row["bytes"]}
    for row in rows:
        if row["bytes"] is None:
            continue
        figures = row["metrics"]
        row["drop"] = (
            None
            if figures["accuracy"] is None or reference["accuracy"] is None
            else reference["accuracy"] - figures["accuracy"]
        )
        stage, reason = _fault(row, max_drop)
        if reason:
            row.update(status="failed", stage=stage, reason=reason)
        row["flags"] += _flags(row, floats.get(row["format"]))


def _fault(row: dict[str, Any], max_drop: float | None) -> tuple[str, str]:
    figures = row["metrics"]
    if not figures["finite"]:
        return "verify", "it gives NaN or infinite values on the evaluation data"
    if row["precision"] in _TOLERANCE:
        relative, decibels = _TOLERANCE[row["precision"]]
        if figures["relative"] > relative or figures["sqnr"] < decibels:
            return "verify", (
                f"its outputs differ from the Keras model's by up to {figures['worst']:.3g} "
                f"({figures['sqnr']:.1f} dB), more than rounding to {row['precision']} explains: an "
                "operator was converted wrongly"
            )
    if max_drop is None:
        return "", ""
    # Shares of a finite number of samples: a hair's breadth of float error must not decide.
    slack = 1e-9
    if row["drop"] is not None:
        if row["drop"] > max_drop + slack:
            return "budget", (
                f"accuracy {100 * figures['accuracy']:.2f} % is {100 * row['drop']:.2f} points below "
                f"the Keras model, more than max_drop allows ({100 * max_drop:g})"
            )
    elif figures["agreement"] is not None:
        if 1 - figures["agreement"] > max_drop + slack:
            return "budget", (
                f"it changes {100 * (1 - figures['agreement']):.2f} % of the Keras model's "
                f"decisions, more than max_drop allows ({100 * max_drop:g} %)"
            )
    elif figures["sqnr"] < _LEAST_SQNR:
        return "budget", (
            f"its outputs keep {figures['sqnr']:.1f} dB of signal over noise, less than "
            f"{_LEAST_SQNR:g} dB"
        )
    return "", ""


def _flags(row: dict[str, Any], float32: dict[str, Any] | None) -> list[str]:
    flags = []
    contents = row["contents"]
    if contents["flex"]:
        flags.append(f"needs TensorFlow operators (Flex): {', '.join(contents['flex'])}")
    if row["precision"] == "float32":
        return flags
    narrow = sum(size for bits, size in contents["weight_bits"].items() if int(bits) < 32)
    if narrow == 0:
        flags.append("quantization did nothing: all weights are still 32-bit floats")
    elif float32 is not None and row["bytes"] >= 0.98 * float32["bytes"]:
        flags.append(
            f"it is not smaller than float32 ({row['bytes']} against {float32['bytes']} B)"
        )
    if row["precision"] == "int8" and contents["float_operators"]:
        flags.append(f"computes in float: {', '.join(contents['float_operators'])}")
    if float32 is not None and row["latency_ms"] > _SLOWER * float32["latency_ms"]:
        times = row["latency_ms"] / float32["latency_ms"]
        flags.append(f"{times:.1f} times slower than float32")
    return flags


def _best(rows: list[dict[str, Any]], objective: str) -> str | None:
    passed = [row for row in rows if row["status"] == "passed"]
    keys = ("bytes", "latency_ms") if objective == "size" else ("latency_ms", "bytes")
    passed.sort(key=lambda row: [row[key] for key in keys])
    return passed[0]["file"] if passed else None


def _ranges(calibrated: Arrays) -> dict[str, Any]:
    return {
        "samples": len(next(iter(calibrated.values()))),
        "ranges": {
            name: [float(array.min()), float(array.max())] for name, array in calibrated.items()
        },
    }


def _curves(history: dict[str, Sequence[float]]) -> dict[str, list[float | None]]:
    return {
        str(key): [float(v) if math.isfinite(float(v)) else None for v in values]
        for key, values in history.items()
    }


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder beside the target in which everything is made, gone afterwards whatever happens."""
    made: list[Path] = []
    try:
        missing = target.parent
        while not missing.exists():
            made.append(missing)
            missing = missing.parent
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        _remove_empty(made)
        raise _explained(error, target) from error
    try:
        yield stage
    except OSError as error:
        raise _explained(error, target) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            # It holds the export by now.
            return


def _explained(error: OSError, target: Path) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OSError(
            error.errno,
            f"The disk is full, so the export to `{target}` was not written and nothing of it was "
            "left behind. Free some space or choose another folder",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionError(
            error.errno,
            f"The export to `{target}` cannot be written ({error.strerror}). Choose another folder",
        )
    return error


def _place(stage: Path, target: Path) -> None:
    # The manifest goes last: until then the folder still describes, or lacks, the earlier export.
    stale: set[str] = set()
    if target.exists():
        try:
            earlier = manifest.read(target)
        except manifest.ManifestError:
            earlier = None
        if earlier is not None:
            stale = {row["file"] for row in earlier["artifacts"] if row.get("file")}
    target.mkdir(exist_ok=True)
    names = sorted(path.name for path in stage.iterdir() if path.name != manifest.FILE)
    for name in (*names, manifest.FILE):
        os.replace(stage / name, target / name)
    for name in stale - set(names):
        (target / name).unlink(missing_ok=True)
