"""`keras-kd cache write | verify | info`: a teacher's answers on disk."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keras_kd.cache import reader, storage
from keras_kd.cache.layout import Manifest, require_dtype
from keras_kd.cli import inputs, options, teachers
from keras_kd.cli.console import Terminal, Work, import_keras
from keras_kd.cli.stored_rows import are_images, shapes_of
from keras_kd.utils.tables import fitted

if TYPE_CHECKING:
    import keras


_HELP = "Run a teacher once over its data and keep its answers on disk."

app = typer.Typer(help=_HELP, short_help=_HELP)

_Folder = Annotated[str, typer.Argument(metavar="DIR", help="Folder of the cache, or a URL.")]


@app.command(short_help="Write a cache, or go on with one that was interrupted.")
def write(
    teacher: Annotated[
        str,
        typer.Argument(
            metavar="TEACHER",
            help="A `.keras`, `.onnx` or `.tflite` file, or an `.npz` file with answers.",
        ),
    ],
    folder: _Folder,
    data: Annotated[
        str,
        typer.Option(help="A data set by name, or an `.npz` file with `x`, or with `x_train`."),
    ] = "digits",
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Store the K most probable classes alone.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="`float16` or `float32`.")] = "float16",
    tap: Annotated[
        list[str] | None, typer.Option(help="A layer to store as well; give it several times.")
    ] = None,
    teacher_precision: Annotated[
        str,
        typer.Option(help="`float32`, `bfloat16`, `float16`, or `auto`: the fastest that agrees."),
    ] = "float32",
    batch_size: Annotated[int, typer.Option(help="Samples a forward pass.")] = 128,
    shard_size: Annotated[int | None, typer.Option(help="Samples a shard.")] = None,
    process_index: Annotated[int, typer.Option(help="Which process this is, from 0.")] = 0,
    process_count: Annotated[int, typer.Option(help="How many write together.")] = 1,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a cache, or go on with one that was interrupted.

    Finished shards stay as they are: after a kill or a full disk, give the same command again.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    teachers.check_file(teacher)
    inputs.check_data(data, "--data")
    require_dtype(dtype)
    asking: dict[str, Any] = {
        "top_k": top_k,
        "taps": tap or [],
        "teacher_precision": teacher_precision,
        "process_index": process_index,
        "process_count": process_count,
    }
    if teacher.endswith(".npz"):
        _refuse_asking(teacher, asking)
    import_keras()
    import keras_kd.cache

    sizes: dict[str, Any] = {"dtype": dtype, "batch_size": batch_size, "shard_size": shard_size}
    if teacher.endswith(".npz"):
        given, x = teachers.answers_of(teacher), _samples(data, None)
        with terminal.working() as work:
            manifest = keras_kd.cache.write_answers(
                folder, x, **given, **sizes, name=Path(teacher).stem, progress=_with_rate(work)
            )
    else:
        model = teachers.of_file(teacher)
        x = _samples(data, model)
        if teacher.endswith(".keras"):
            inputs.check_inputs(x, "cached", model)
        with terminal.working() as work:
            manifest = keras_kd.cache.write(
                model, x, folder, **asking, **sizes, progress=_with_rate(work)
            )
    verdict = (
        f"`{folder}` holds the answers to {manifest.count:,} samples, {manifest.nbytes:,} bytes."
        if manifest.complete
        else "The shards of this process are written; the others are still to finish theirs."
    )
    terminal.result(_document(manifest), _table(manifest, terminal.width), "", verdict)


@app.command(
    short_help="Compare every byte of a cache with its checksums, and it with its teacher and data."
)
def verify(
    folder: _Folder,
    teacher: Annotated[
        str | None,
        typer.Option(help="A `.keras`, `.onnx` or `.tflite` file whose answers these should be."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The data that they should belong to, as for `write`.")
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare every byte of a cache with its checksums, and it with its teacher and data.

    Exit code 0 if all is as it was written, 2 with what is wrong if it is not.
    """
    terminal = Terminal(as_json=as_json, quiet=quiet)
    if teacher is not None:
        teachers.check_file(teacher, (".keras", ".onnx", ".tflite"))
    inputs.check_data(data, "--data")
    reader.read_manifest(storage.folder(folder))
    if teacher is not None or data is not None:
        import_keras()
    import keras_kd.cache

    model = teachers.of_file(teacher) if teacher is not None else None
    x = None if data is None else _samples(data, model)
    manifest = keras_kd.cache.verify(folder, teacher=model, data=x)
    verdict = f"Verified: {len(manifest.shards)} shards have the recorded SHA-256."
    terminal.result(_document(manifest), _table(manifest, terminal.width), "", verdict)


@app.command(short_help="Show what a cache holds, finished or not.")
def info(folder: _Folder, as_json: options.Json = False) -> None:
    """Show what a cache holds, finished or not."""
    terminal = Terminal(as_json=as_json, quiet=True)
    manifest = reader.read_manifest(storage.folder(folder))
    terminal.result(_document(manifest), _table(manifest, terminal.width))


def _refuse_asking(teacher: str, options: dict[str, Any]) -> None:
    """Raise `ValueError` for options of a teacher that is asked, beside answers that exist."""
    usual = {"teacher_precision": "float32", "process_index": 0, "process_count": 1}
    for name, value in options.items():
        if value and value != usual.get(name):
            option = {"taps": "tap"}.get(name, name).replace("_", "-")
            raise ValueError(
                f"`--{option}` is for a teacher that is asked, and `{teacher}` holds answers that "
                "exist already. Leave it out."
            )


def _samples(data: str, model: keras.Model | None) -> Any:
    """The training inputs of a data set, or what a file holds for a model."""
    import keras_kd.datasets
    from keras_kd.datasets import files
    from keras_kd.teachers.base import Teacher

    if not data.endswith(".npz"):
        return keras_kd.datasets.load(data).x_train
    arrays = files.read(data)
    if isinstance(model, Teacher) and not {"x", "x_train"} & set(arrays):
        # A file of another runtime finds its inputs by their names.
        return arrays
    names = [tensor.name for tensor in getattr(model, "inputs", None) or []]
    if "x" in arrays and not (len(names) > 1 and set(names) <= set(arrays)):
        return arrays["x"]
    if names and set(names) <= set(arrays):
        return {name: arrays[name] for name in names} if len(names) > 1 else arrays[names[0]]
    if "x_train" in arrays:
        shapes = {} if isinstance(model, Teacher) or model is None else shapes_of(model)
        # Rows that are no images are taken as they are, as `keras-kd distill` takes them.
        return files.load(data).x_train if are_images(arrays, shapes) else arrays["x_train"]
    raise ValueError(
        f"`{data}` holds {', '.join(f'`{name}`' for name in arrays) or 'no arrays'}. Store the "
        "teacher's inputs as `x`, by the names of its input layers"
        + (" (which `--teacher` tells)" if model is None else "")
        + ", or as `x_train` of a data set."
    )


def _with_rate(work: Work) -> Callable[[int, int | None], None]:
    """Progress with samples a second and the time left."""
    began: list[tuple[float, int]] = []

    def report(done: int, total: int | None) -> None:
        now = time.monotonic()
        began.append((now, done)) if not began else None
        seconds, rows = now - began[0][0], done - began[0][1]
        detail = ""
        if seconds > 0 and rows > 0:
            rate = rows / seconds
            detail = f"{rate:,.0f} samples/s"
            if total is not None:
                left = datetime.timedelta(seconds=round((total - done) / rate))
                detail += f", {left} left"
        work("write", done, total or done, detail)

    return report


def _document(manifest: Manifest) -> dict[str, Any]:
    return {
        "complete": manifest.complete,
        "teacher": manifest.teacher,
        "samples": manifest.count,
        "epochs": manifest.epochs,
        "record_bytes": manifest.record_bytes,
        "bytes": manifest.nbytes,
        "shard_size": manifest.shard_size,
        "shards": len(manifest.shards),
        "layout": manifest.layout.to_json(),
        "augment": manifest.augment,
        "order": manifest.order,
        "versions": manifest.versions,
    }


def _table(manifest: Manifest, width: int) -> str:
    layout = manifest.layout
    outputs = [
        f"{'x'.join(map(str, output.shape))} {output.kind}"
        + (f", top {output.top_k}" if output.top_k else "")
        for output in layout.outputs
    ]
    rows = [
        ("teacher", f"{manifest.teacher['name']} ({manifest.teacher['fingerprint'][:12]})"),
        ("outputs", "; ".join(outputs)),
        ("taps", ", ".join(path for path, _ in layout.taps) or "none"),
        ("samples", "not known yet" if manifest.count is None else f"{manifest.count:,}"),
        ("views", f"{manifest.epochs}" if manifest.augment else "none"),
        ("record", f"{manifest.record_bytes:,} bytes, {layout.dtype}"),
        ("records", f"{manifest.nbytes:,} bytes"),
        ("shards", f"{len(manifest.shards)} of {manifest.shard_size:,} samples"),
        ("state", "complete" if manifest.complete else "half written"),
    ]
    return "\n".join(fitted(("", "cache"), rows, width=width, left=2))
