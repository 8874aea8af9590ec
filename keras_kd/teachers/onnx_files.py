"""ONNX files as teachers, in ONNX Runtime on the host."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_kd.teachers import files
from keras_kd.teachers.black_box import LOGITS, PROBABILITIES, UNKNOWN, BlackBox
from keras_kd.teachers.files import Opened, Tensor
from keras_kd.utils import checks
from keras_kd.utils.onnx_types import DTYPES
from keras_kd.utils.types import PathLike

_OTHERS = {"tensor(string)": "object"}
# What hands numbers on, and what makes probabilities or any numbers of what it is given.
_PASSING = ("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "ZipMap")
_ENDS = {
    "Softmax": PROBABILITIES,
    "Sigmoid": PROBABILITIES,
    "TreeEnsembleClassifier": PROBABILITIES,
    "LinearClassifier": PROBABILITIES,
    "SVMClassifier": PROBABILITIES,
    "Normalizer": PROBABILITIES,
    "LogSoftmax": LOGITS,
    "Gemm": LOGITS,
    "MatMul": LOGITS,
    "Conv": LOGITS,
    "Add": LOGITS,
    "TreeEnsembleRegressor": LOGITS,
    "LinearRegressor": LOGITS,
}


def from_onnx(
    path: PathLike,
    outputs: str | Mapping[str, str] | None = None,
    *,
    classes: Sequence[Any] | None = None,
    binary: bool | None = None,
    name: str | None = None,
    version: str | None = None,
    threads: int = 0,
) -> BlackBox:
    """Make a teacher of an ONNX file, which ONNX Runtime runs on the CPU of the host.

    Inputs are matched by name where the batch is a dict, else in their order, and cast to the
    types of the file. A file for batches of one size is run in pieces of that size. Outputs that
    are no floats, as the label beside the probabilities of a converted classifier, are left out.
    A softmax, a sigmoid or a classifier of `ai.onnx.ml` at the end makes probabilities of an
    output, as far as the package `onnx` is there to tell; what else ends in weights makes logits.

    Args:
        path: The file.
        outputs: As in `BlackBox`; with a dict only the outputs that it names are read. `None`
            finds out.
        classes: Names of the classes; they are compared with those that the file holds, and `None`
            takes them from there.
        binary: Whether units are independent. `None` finds out.
        name: For messages and records. Defaults to the name of the file.
        version: As in `BlackBox`. The bytes of the file count in any case.
        threads: Threads that the runtime takes; 0 leaves it to the runtime.

    Returns:
        The teacher.

    Raises:
        ValueError: If there is no such file, the runtime cannot load it, `outputs` names none of
            its outputs, it has no outputs of floats, or has other classes.
        ImportError: If ONNX Runtime is not installed.

    Examples:
        >>> distiller = keras_kd.Distiller(student, from_onnx("teacher.onnx"))
    """
    checks.whole("threads", threads, least=0)
    file = files.existing(path, "an ONNX")
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
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "An ONNX file runs in ONNX Runtime: `pip install onnxruntime onnx`."
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # The runtime has a type of its own for each reason.
        raise ValueError(
            f"`{file}` is no ONNX file that ONNX Runtime loads: {str(error)[:300]}"
        ) from error
    ends, parts = _looked_into(file)

    def tensor(value: Any) -> Tensor:
        maps = value.type.startswith("seq(map(")
        shape = () if maps else tuple(n if isinstance(n, int) else None for n in value.shape)
        dtype = _OTHERS.get(value.type, DTYPES.get(value.type, value.type))
        if maps:
            dtype = "map"
        form, binary = ends.get(value.name, (UNKNOWN, False))
        return Tensor(value.name, shape, dtype, PROBABILITIES if maps else form, binary)

    def run(feed: dict[str, np.ndarray], names: list[str]) -> dict[str, Any]:
        return dict(zip(names, session.run(names, feed), strict=True))

    labels = session.get_modelmeta().custom_metadata_map.get("labels")
    return Opened(
        [tensor(each) for each in session.get_inputs()],
        [tensor(each) for each in session.get_outputs()],
        run,
        None if labels is None else _labels(labels),
        parts,
    )


def _labels(text: str) -> list[str] | None:
    """Names of classes in the metadata of a file, where they are a list in JSON."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return [str(each) for each in found] if isinstance(found, list) else None


def _looked_into(file: str) -> tuple[dict[str, tuple[str, bool]], list[str]]:
    """What each output ends in, and whether in a sigmoid; and the files that hold the weights.

    Without the package `onnx` nothing is known of the ends, and the file of weights is looked for
    under the names that exporters give it.
    """
    try:
        import onnx
    except ImportError:
        beside = [file + ending for ending in (".data", "_data") if os.path.isfile(file + ending)]
        return {}, [file, *beside]
    graph = onnx.load(file, load_external_data=False).graph
    made = {name: node for node in graph.node for name in node.output}
    found = {}
    for output in graph.output:
        node = made.get(output.name)
        while node is not None and node.op_type in _PASSING:
            node = made.get(node.input[0])
        if node is not None and node.op_type in _ENDS:
            found[output.name] = (_ENDS[node.op_type], node.op_type == "Sigmoid")
    names = {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return found, [file, *(os.path.join(os.path.dirname(file), name) for name in sorted(names))]
