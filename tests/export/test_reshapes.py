"""Shapes of a free batch, constant where they can be, and files of a batch of one."""

import keras
import numpy as np
import onnx
import pytest
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.tools import flatbuffer_utils
from keras import layers, ops

import keras_kd.export
from keras_kd.export.formats.runtime import open_file, run_all
from keras_kd.export.source import reshapes

ARITHMETIC = {"SHAPE", "PACK", "Shape"}


@keras.saving.register_keras_serializable(package="test_reshapes")
class Folded(layers.Layer):
    """Computes the last size from others: (batch, 4, 6) to (batch, 12, 2)."""

    def call(self, x):
        size = ops.shape(x)
        return ops.reshape(x, (size[0], size[1] * 3, 2))


def kinds(path):
    if path.suffix == ".onnx":
        return {node.op_type for node in onnx.load(path).graph.node}
    model = flatbuffer_utils.read_model(str(path))
    return {
        flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex)
        for operator in model.subgraphs[0].operators
    }


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(4)
    x = keras.Input((4, 6), name="x")
    y = layers.Reshape((2, 12))(x)
    y = layers.Conv1D(6, 1, name="mix")(y)
    y = layers.Flatten()(y)
    z = layers.Dense(4)(layers.Flatten()(Folded()(x)))
    return keras.Model(x, {"y": layers.Dense(3)(y), "z": z}, name="shapes")


def exported(model, folder, batch):
    x = np.random.default_rng(0).normal(size=(40, *model.inputs[0].shape[1:])).astype("float32")
    return x, keras_kd.export(
        model,
        folder,
        precisions=("float32", "int8"),
        calibration=x,
        evaluation=x,
        max_drop=None,
        batch=batch,
    )


@pytest.fixture(scope="module")
def free(model, tmp_path_factory):
    return exported(model, tmp_path_factory.mktemp("free") / "out", None)


@pytest.fixture(scope="module")
def single(model, tmp_path_factory):
    return exported(model, tmp_path_factory.mktemp("single") / "out", 1)


def test_no_file_computes_a_shape_that_one_open_size_says(free):
    x, report = free
    for artifact in report.artifacts:
        assert artifact.passed, artifact.reason
        assert artifact.batch == "dynamic"
        assert not kinds(artifact.path) & ARITHMETIC, artifact.file
        one, many = (run_all(open_file(artifact.path), {"x": x[:6]}, n) for n in (1, 6))
        for name in ("y", "z"):
            np.testing.assert_allclose(one[name], many[name], atol=1e-5)


def test_a_compiled_model_resizes_behind_a_flatten(free):
    from ai_edge_litert.compiled_model import CompiledModel

    x, report = free
    path = next(
        a.path for a in report.artifacts if (a.format, a.precision) == ("tflite", "float32")
    )
    compiled = CompiledModel.from_file(str(path))
    compiled.resize_input_tensor(0, [5, 4, 6])
    inputs, outputs = (compiled.create_input_buffers(0), compiled.create_output_buffers(0))
    inputs[0].write(np.ascontiguousarray(x[:5]))
    compiled.run_by_index(0, inputs, outputs)
    want = open_file(path).run({"x": x[:5]})
    widths = {want[name].size: want[name] for name in ("y", "z")}
    for buffer, size in zip(outputs, (15, 20), strict=False):
        values = buffer.read(size, np.float32)
        np.testing.assert_allclose(np.ravel(values), widths[size].ravel(), rtol=1e-5, atol=1e-6)


def test_a_batch_of_one_is_written_into_every_file(single):
    _, report = single
    for artifact in report.artifacts:
        assert artifact.passed, artifact.reason
        assert artifact.batch == "static"
        assert not kinds(artifact.path) & ARITHMETIC, artifact.file
        for tensor in artifact.details["signature"]["inputs"]:
            assert tensor["shape"] == [1, 4, 6]
        assert "does not convert" not in " ".join(artifact.details["notes"])
        # Products stay products, which 4 bits need, also in ONNX.
        assert "Gemm" not in kinds(artifact.path) or artifact.precision == "int8"


def test_a_recurrent_model_of_free_batch_starts_from_a_size_and_no_loop(tmp_path):
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((5, 3), name="x"), layers.LSTM(4), layers.Dense(2)])
    x, report = exported(model, tmp_path / "free", None)
    _, single = exported(model, tmp_path / "one", 1)
    for found in (report, single):
        for artifact in found.artifacts:
            assert artifact.passed, artifact.reason
        loops = kinds(found.folder / "model_float32.onnx")
        assert "LSTM" in loops
        assert not loops & {"Loop", "Cast"}
    assert not kinds(single.folder / "model_float32.onnx") & ARITHMETIC
    assert not kinds(single.folder / "model_int8.tflite") & ARITHMETIC
    answers = run_all(open_file(report.folder / "model_float32.onnx"), {"x": x}, 8)
    np.testing.assert_allclose(next(iter(answers.values())), model.predict(x, verbose=0), atol=1e-5)


def test_attention_of_a_free_batch_reshapes_to_constants(tmp_path):
    # Its products are reshaped to (batch * heads, ...) and back, through sizes computed of sizes.
    keras.utils.set_random_seed(6)
    x = keras.Input((6, 8), name="x")
    y = layers.MultiHeadAttention(2, 4)(x, x)
    model = keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling1D()(y)))
    data = np.random.default_rng(0).normal(size=(40, 6, 8)).astype("float32")
    report = keras_kd.export(
        model, tmp_path / "out", formats="onnx", precisions="float32", evaluation=data
    )
    graph = onnx.load(report.best.path).graph
    constants = {entry.name for entry in graph.initializer}
    reshapes_ = [node for node in graph.node if node.op_type == "Reshape"]
    assert len(reshapes_) >= 4
    assert all(node.input[1] in constants for node in reshapes_)
    (got,) = run_all(open_file(report.best.path), {"x": data[:5]}, 5).values()
    np.testing.assert_allclose(got, model.predict(data[:5], verbose=0), atol=1e-5)


@pytest.mark.parametrize("batch", [0, 2, True, "1"])
def test_other_batch_sizes_are_refused(model, tmp_path, batch):
    with pytest.raises(ValueError, match="`batch` must be None"):
        exported(model, tmp_path / "out", batch)
    assert not (tmp_path / "out").exists()


def graph(nodes, inputs, outputs, constants):
    make = onnx.helper
    return make.make_model(
        make.make_graph(
            nodes,
            "g",
            [make.make_tensor_value_info("x", 1, inputs)],
            [make.make_tensor_value_info("y", 1, outputs)],
            [onnx.numpy_helper.from_array(np.asarray(v, "int64"), k) for k, v in constants.items()],
        ),
        opset_imports=[make.make_opsetid("", 17)],
        ir_version=8,
    )


def test_two_free_sizes_that_change_places_stay_computed():
    # (batch, steps, 4) to (steps, batch, 4): neither 0 nor one -1 says that.
    node = onnx.helper.make_node
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "order"], ["t"]),
        node("Reshape", ["x", "t"], ["y"]),
    ]
    model = graph(nodes, ["batch", "steps", 4], ["steps", "batch", 4], {"order": [1, 0, 2]})
    reshapes.onnx(model)
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = np.arange(24, dtype="float32").reshape(2, 3, 4)
    (got,) = session.run(None, {"x": x})
    np.testing.assert_array_equal(got, x.reshape(3, 2, 4))


def test_two_free_sizes_in_place_are_copied_and_the_rest_follows():
    node = onnx.helper.make_node
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Slice", ["s", "zero", "two"], ["head"]),
        node("Concat", ["head", "rest"], ["t"], axis=0),
        node("Reshape", ["x", "t"], ["y"]),
    ]
    constants = {"zero": [0], "two": [2], "rest": [2, 2]}
    model = graph(nodes, ["batch", "steps", 4], ["batch", "steps", 2, 2], constants)
    reshapes.onnx(model)
    assert [n.op_type for n in model.graph.node] == ["Reshape"]
    shape = next(i for i in model.graph.initializer if i.name == model.graph.node[0].input[1])
    assert list(onnx.numpy_helper.to_array(shape)) == [0, 0, 2, 2]
    onnx.checker.check_model(model, full_check=True)


def test_the_interpreter_of_a_free_file_takes_any_batch(free):
    _, report = free
    path = report.folder / "model_int8.tflite"
    runner = Interpreter(str(path)).get_signature_runner()
    for count in (1, 7):
        result = runner(x=np.zeros((count, 4, 6), np.int8))
        assert {len(array) for array in result.values()} == {count}


def test_the_inner_results_of_an_onnx_file_of_one_sample_are_read(tmp_path):
    keras.utils.set_random_seed(1)
    x = keras.Input((8, 3), name="x")
    y = layers.LSTM(6, name="lstm")(x)
    model = keras.Model(x, layers.Dense(2, name="last")(y), name="rnn")
    given = np.random.default_rng(3).normal(size=(20, 8, 3)).astype("float32")
    report = keras_kd.export(
        model,
        tmp_path,
        formats=("onnx",),
        precisions=("float32", "float16", "int8"),
        calibration=given,
        batch=1,
        max_drop=None,
    )
    assert [artifact.reason for artifact in report.artifacts] == ["", "", ""]
    rows = {row["layer"]: row["sqnr"] for row in report.layers().rows()}
    # The noise of the last layer is that of the file's answers on the same 20 samples.
    assert rows["last"] == pytest.approx(report.artifacts[2].sqnr, abs=1.0)
