"""TFLite files as teachers, in LiteRT on the host."""

import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_kd.teachers import files
from keras_kd.teachers.black_box import LOGITS, PROBABILITIES, UNKNOWN, BlackBox
from keras_kd.teachers.files import Opened, Tensor
from keras_kd.utils import archives, checks
from keras_kd.utils.types import PathLike

_PASSING = ("DEQUANTIZE", "QUANTIZE", "RESHAPE", "SQUEEZE", "EXPAND_DIMS", "CAST")
_ENDS = {
    "SOFTMAX": PROBABILITIES,
    "LOGISTIC": PROBABILITIES,
    "LOG_SOFTMAX": LOGITS,
    "FULLY_CONNECTED": LOGITS,
    "CONV_2D": LOGITS,
    "BATCH_MATMUL": LOGITS,
    "ADD": LOGITS,
}


def from_tflite(
    path: PathLike,
    outputs: str | Mapping[str, str] | None = None,
    *,
    classes: Sequence[Any] | None = None,
    binary: bool | None = None,
    name: str | None = None,
    version: str | None = None,
    threads: int = 1,
) -> BlackBox:
    """Make a teacher of a TFLite file, which LiteRT runs on the CPU of the host.

    Quantized inputs and outputs are read in real numbers, by the scales in the file; the smallest
    probability is then one step of the scale. All else is as in `from_onnx`: a softmax or a
    sigmoid at the end makes probabilities, other arithmetic logits.

    Args:
        path: The file.
        outputs: As in `from_onnx`.
        classes: Names of the classes; they are compared with those that the file holds, and `None`
            takes them from there.
        binary: Whether units are independent. `None` finds out.
        name: For messages and records. Defaults to the name of the file.
        version: As in `BlackBox`. The bytes of the file count in any case.
        threads: Threads of the interpreter.

    Returns:
        The teacher.

    Raises:
        ValueError: If there is no such file, the runtime cannot load it, `outputs` names none of
            its outputs, it has no outputs of numbers, or has other classes.
        ImportError: If LiteRT is not installed.

    Examples:
        >>> distiller = keras_kd.Distiller(student, from_tflite("teacher.tflite"))
    """
    checks.whole("threads", threads)
    file = files.existing(path, "a TFLite")
    return files.teacher_of(
        file,
        _open(file, threads),
        outputs,
        classes=classes,
        binary=binary,
        name=name,
        version=version,
    )


def _open(file: str, threads: int) -> Opened:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ImportError("A TFLite file runs in LiteRT: `pip install ai-edge-litert`.") from error
    try:
        interpreter = Interpreter(model_path=file, num_threads=threads)
        interpreter.allocate_tensors()
    except Exception as error:
        # RuntimeError for most files, ValueError for those that are none.
        raise ValueError(
            f"`{file}` is no TFLite file that LiteRT loads: {str(error)[:300]}"
        ) from error
    signatures = interpreter.get_signature_list()
    named = next(iter(signatures.items()), None) if len(signatures) == 1 else None
    # The names of a signature are those of the model, where a tensor has one of its own.
    runner = interpreter.get_signature_runner(named[0]) if named else None
    ins = (
        list(runner.get_input_details().items())
        if runner is not None
        else [(row["name"], row) for row in interpreter.get_input_details()]
    )
    outs = (
        list(runner.get_output_details().items())
        if runner is not None
        else [(row["name"], row) for row in interpreter.get_output_details()]
    )
    by_name = dict(ins)
    ends = _ends(file)

    def tensor(name: str, row: Any) -> Tensor:
        shape = tuple(int(n) if n >= 0 else None for n in row["shape_signature"])
        scale = float(row["quantization"][0])
        dtype = "float32" if scale else np.dtype(row["dtype"]).name
        form, binary = ends.get(int(row["index"]), (UNKNOWN, False))
        return Tensor(name, shape, dtype, form, binary, scale)

    def run(feed: dict[str, np.ndarray], names: list[str]) -> dict[str, Any]:
        for name, x in feed.items():
            row = by_name[name]
            if tuple(interpreter.get_input_details()[places[name]]["shape"]) != x.shape:
                interpreter.resize_tensor_input(row["index"], x.shape)
        interpreter.allocate_tensors()
        for name, x in feed.items():
            interpreter.set_tensor(by_name[name]["index"], _quantized(x, by_name[name]))
        interpreter.invoke()
        return {
            name: _real(interpreter.get_tensor(row["index"]), row)
            for name, row in outs
            if name in names
        }

    order = [int(row["index"]) for row in interpreter.get_input_details()]
    places = {name: order.index(int(row["index"])) for name, row in ins}
    # The runner holds on to the memory of the interpreter, which forbids what `run` does.
    runner = None
    inputs = [tensor(name, row) for name, row in ins]
    outputs = [tensor(name, row) for name, row in outs]
    return Opened(inputs, outputs, run, _packed_labels(file), [file])


def _packed_labels(file: str) -> list[str] | None:
    """The classes in `labels.txt`, which TFLite's metadata packs behind the model."""
    if not zipfile.is_zipfile(file):
        return None
    with archives.archive(file) as packed:
        if "labels.txt" not in packed.namelist():
            return None
        return packed.read("labels.txt").decode("utf-8", "replace").split("\n")[:-1] or None


def _ends(file: str) -> dict[int, tuple[str, bool]]:
    """What each output ends in, and whether in a sigmoid, by the number of its tensor."""
    from ai_edge_litert import schema_py_generated as schema

    names = {value: name for name, value in vars(schema.BuiltinOperator).items()}
    with archives.opened(file) as stream:
        model = schema.ModelT.InitFromPackedBuf(stream.read(), 0)
    graph = model.subgraphs[0]
    made = {int(i): operator for operator in graph.operators for i in operator.outputs}

    def kind(operator: Any) -> str:
        code = model.operatorCodes[operator.opcodeIndex]
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        return str(names.get(number, ""))

    found = {}
    for output in graph.outputs:
        operator = made.get(int(output))
        while operator is not None and kind(operator) in _PASSING:
            operator = made.get(int(operator.inputs[0]))
        end = "" if operator is None else kind(operator)
        if end in _ENDS:
            found[int(output)] = (_ENDS[end], end == "LOGISTIC")
    return found


def _quantized(x: np.ndarray, row: Any) -> np.ndarray:
    """Real numbers as a file takes them."""
    scale, zero = row["quantization"]
    if scale and np.issubdtype(row["dtype"], np.integer):
        limits = np.iinfo(row["dtype"])
        x = np.clip(np.round(x / scale) + zero, limits.min, limits.max)
    return np.ascontiguousarray(x, row["dtype"])


def _real(x: np.ndarray, row: Any) -> np.ndarray:
    """What a file answers, in real numbers."""
    scale, zero = row["quantization"]
    if scale and np.issubdtype(row["dtype"], np.integer):
        return (x.astype("float32") - zero) * np.float32(scale)
    return x
