"""What `docs/teachers.md` shows runs as it stands there."""

import re
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save
from small_models import CLASSES, FEATURES, crossentropy, mlp, rows

from keras_kd.teachers import CachedTeacher

PAGE = Path(__file__).parents[2] / "docs" / "teachers.md"


def test_the_examples_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = rows(count=40)
    kernel = np.ones((FEATURES, CLASSES), "float32")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["z"])],
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", FEATURES])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", CLASSES])],
        [numpy_helper.from_array(kernel, "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=8), "teacher.onnx")
    names = {
        "x": x,
        "y": y,
        "student": mlp(name="student"),
        "model": mlp(name="model"),
        "loss": crossentropy(),
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert np.isfinite(names["history"].history["loss"]).all()
    assert CachedTeacher("answers").outputs[0].shape == (2, 32)
