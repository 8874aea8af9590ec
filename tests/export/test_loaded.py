"""Exported files as Python functions."""

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from ai_edge_litert.interpreter import Interpreter
from keras import layers

import keras_kd
import keras_kd.export
from keras_kd.export import ManifestError

rng = np.random.default_rng(11)


def run(path, feed):
    """Integers or floats of a TFLite file, one sample at a time, through the plain interpreter."""
    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    details = {row["name"]: row for row in interpreter.get_input_details()}
    rows = []
    for i in range(len(next(iter(feed.values())))):
        for name, array in feed.items():
            interpreter.set_tensor(details[name]["index"], array[i : i + 1])
        interpreter.invoke()
        outputs = interpreter.get_output_details()
        rows.append({row["name"]: interpreter.get_tensor(row["index"]) for row in outputs})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two inputs whose names do not follow their order, and two outputs: (model, x, report)."""
    keras.utils.set_random_seed(0)
    words, numbers = keras.Input((5,), dtype="int32", name="words"), keras.Input((3,), name="age")
    embedded = layers.GlobalAveragePooling1D()(layers.Embedding(20, 4, name="table")(words))
    both = layers.Concatenate()([embedded, layers.Dense(4, name="wide")(numbers)])
    hidden = layers.Dense(8, activation="relu", name="hidden")(both)
    model = keras.Model(
        [words, numbers],
        [layers.Dense(3, name="topic")(hidden), layers.Dense(1, name="amount")(hidden)],
    )
    x = [rng.integers(0, 20, (70, 5)).astype("int32"), rng.normal(size=(70, 3)).astype("float32")]
    named = {"words": x[0], "age": x[1]}
    report = keras_kd.export(
        model,
        tmp_path_factory.mktemp("pair") / "pair",
        precisions=("float32", "int8"),
        calibration=named,
        evaluation=named,
        max_drop=None,
    )
    return model, x, report


def artifact(report, name):
    return next(a for a in report.artifacts if f"{a.format} {a.precision}" == name)


@pytest.mark.parametrize("form", ["list", "tuple", "dict"])
@pytest.mark.parametrize("fmt", ["tflite", "onnx"])
def test_inputs_go_in_as_the_keras_model_takes_them(pair, fmt, form):
    model, x, report = pair
    loaded = keras_kd.export.load(artifact(report, f"{fmt} float32").path)
    assert [row["name"] for row in loaded.inputs] == ["words", "age"]
    given = {"list": x, "tuple": tuple(x), "dict": {"age": x[1], "words": x[0]}}[form]
    got = loaded(given)
    want = model.predict(x, verbose=0)
    assert list(got) == ["topic", "amount"]
    np.testing.assert_allclose(got["topic"], want[0], atol=1e-5)
    np.testing.assert_allclose(got["amount"], want[1], atol=1e-5)


@pytest.mark.parametrize("fmt", ["tflite", "onnx"])
def test_batches_have_any_size(pair, fmt):
    _, x, report = pair
    loaded = keras_kd.export.load(artifact(report, f"{fmt} int8").path)
    whole = loaded(x)
    for count in (0, 1, 63, 64, 65):
        part = loaded([array[:count] for array in x])
        assert part["topic"].shape == (count, 3)
        np.testing.assert_allclose(part["topic"], whole["topic"][:count], atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "float16", "dynamic", "int8"])
def test_onnx_files_answer_as_in_onnx_runtime(report, blobs, precision):
    path = artifact(report, f"onnx {precision}").path
    x = blobs[0][:70]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    # One range a batch in dynamic files: one sample at a time, as on a device.
    want = np.concatenate([session.run(None, {"image": row[None]})[0] for row in x])
    np.testing.assert_allclose(keras_kd.export.load(path)(x), want, atol=1e-4)


@pytest.mark.parametrize("name", ["int8", "uint8"])
def test_integers_of_tflite_are_those_of_the_interpreter(images, colored, name):
    path = artifact(images, f"tflite {name}").path
    loaded = keras_kd.export.load(path)
    exact = keras_kd.export.load(path, integers=True)
    (before,), (after,) = loaded.inputs, loaded.outputs
    x = (colored[0] / 255).astype("float32")
    limits = np.iinfo(name)
    steps = np.clip(np.round(x / before["scale"]) + before["zero_point"], limits.min, limits.max)
    whole = steps.astype(name)
    want = run(path, {"image": whole})["color"]
    assert want.dtype == name
    for given in (whole, x, x.astype("float64")):
        got = exact(given)
        assert got.dtype == name
        np.testing.assert_array_equal(got, want)
    real = (want.astype("float32") - after["zero_point"]) * after["scale"]
    np.testing.assert_allclose(loaded(whole), real, atol=1e-6)
    # Values that the file cannot hold go to the end of its range, as on a device.
    ends = run(path, {"image": np.full_like(whole[:1], limits.max)})["color"]
    np.testing.assert_array_equal(exact(np.full((1, 8, 8, 3), 1e6)), ends)


def test_integers_of_onnx_are_those_of_its_borders(images, colored):
    path = artifact(images, "onnx int8").path
    loaded = keras_kd.export.load(path, integers=True)
    (before,), (after,) = loaded.inputs, loaded.outputs
    x = (colored[0] / 255).astype("float32")
    limits = np.iinfo(before["dtype"])
    steps = np.round(x / before["scale"]) + before["zero_point"]
    whole = np.clip(steps, limits.min, limits.max).astype(before["dtype"])
    got = loaded(whole)
    assert got.dtype == after["dtype"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    real = (whole.astype("float32") - before["zero_point"]) * np.float32(before["scale"])
    want = session.run(None, {"image": real})[0]
    np.testing.assert_array_equal(got, np.round(want / after["scale"]) + after["zero_point"])


def test_a_folder_gives_its_best_file(report, blobs):
    loaded = keras_kd.export.load(report.folder)
    assert loaded.path == report.best.path
    assert loaded(blobs[0][:3]).shape == (3, 4)
    assert "logits" in repr(loaded)
    # Rows of a list are one input, and a list of one array too.
    np.testing.assert_array_equal(loaded(blobs[0][:2].tolist()), loaded([blobs[0][:2]]))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((8, 8, 1)), ValueError, r"shape \(8, 8, 1\).*For one sample pass `x\[None\]`"),
        (np.zeros((2, 9, 8, 1)), ValueError, r"takes \(samples, 8, 8, 1\)"),
        ({"imag": np.zeros((2, 8, 8, 1))}, ValueError, "Did you mean `image`"),
        ({}, ValueError, r"\['image'\] .* are missing"),
        (np.full((2, 8, 8, 1), "x"), TypeError, "numbers are needed"),
        (np.full((2, 8, 8, 1), np.nan), ValueError, "NaN or infinite"),
        (
            np.full((2, 8, 8, 1), 1e300),
            ValueError,
            r"`image` .* int8, and holds 1e\+300, more than",
        ),
        ([[1, 2], [3]], ValueError, "is no array"),
    ],
)
def test_inputs_that_do_not_fit_are_named(report, x, error, message):
    loaded = keras_kd.export.load(artifact(report, "tflite int8").path)
    with pytest.raises(error, match=message):
        loaded(x)


@pytest.mark.parametrize("fmt", ["tflite", "onnx"])
def test_whole_numbers_do_not_wrap(pair, fmt):
    _, x, report = pair
    loaded = keras_kd.export.load(artifact(report, f"{fmt} float32").path)
    np.testing.assert_array_equal(
        loaded([x[0].astype("float64"), x[1]])["topic"], loaded(x)["topic"]
    )
    for words, message in (
        (x[0].astype("int64") + 2**40, "takes int32, and holds values from"),
        (x[0] + 0.5, "not whole"),
        (np.full(x[0].shape, np.nan), "not whole, such as nan"),
        (np.full(x[0].shape, np.inf), "from inf to inf"),
        # The greatest int32 is no float32: what stands for it is one more, and would wrap.
        (np.full(x[0].shape, 2**31, "float32"), "takes int32, and holds values from"),
        (np.full(x[0].shape, -1.5, "float16"), "not whole, such as -1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded([words, x[1]])
    with pytest.raises(ValueError, match=r"`age` of .* takes float32, and holds -1e\+39, more"):
        loaded([x[0], np.where(x[1] > 1, -1e39, x[1].astype("float64"))])
    with pytest.raises(ValueError, match="cannot compute these inputs.*rows that there are"):
        loaded([x[0] + 20, x[1]])
    with pytest.raises(ValueError, match="differ in length"):
        loaded([x[0][:3], x[1][:2]])
    with pytest.raises(ValueError, match="has 2 inputs and was given 1"):
        loaded(x[1])


def test_files_whose_outputs_are_no_rows_are_refused(tmp_path):
    """Cut into samples, or joined of several batches, such an output would be another one."""
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0])],
        "turned",
        [onnx.helper.make_tensor_value_info("x", floats, ["batch", 3])],
        [onnx.helper.make_tensor_value_info("y", floats, [3, "batch"])],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "turned.onnx"
    )
    turned = keras_kd.export.load(tmp_path / "turned.onnx")
    with pytest.raises(ValueError, match=r"`y` of `turned.onnx` has shape \(3, 5\) for 5 samples"):
        turned(np.zeros((5, 3), "float32"))


def test_yes_and_no_are_0_and_1(tmp_path):
    boolean, floats = onnx.TensorProto.BOOL, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Cast", ["flag"], ["y"], to=floats)],
        "cast",
        [onnx.helper.make_tensor_value_info("flag", boolean, ["batch", 1])],
        [onnx.helper.make_tensor_value_info("y", floats, ["batch", 1])],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.save(model, tmp_path / "cast.onnx")
    loaded = keras_kd.export.load(tmp_path / "cast.onnx")
    np.testing.assert_array_equal(loaded(np.array([[1], [0]])), [[1.0], [0.0]])
    for value in (0.5, 2, np.nan):
        with pytest.raises(ValueError, match="neither 0 nor 1"):
            loaded(np.array([[value], [0]]))


def test_files_that_cannot_run_are_refused(report, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        keras_kd.export.load(tmp_path / "a.tflite")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="neither"):
        keras_kd.export.load(tmp_path / "a.txt")
    for suffix in ("tflite", "onnx"):
        (tmp_path / f"a.{suffix}").write_bytes(b"nothing of the kind" * 9)
        with pytest.raises(ValueError, match="cannot be loaded"):
            keras_kd.export.load(tmp_path / f"a.{suffix}")
    with pytest.raises(ValueError, match="no output of"):
        keras_kd.export.load(artifact(report, "onnx float32").path, integers=True)
    with pytest.raises(ManifestError, match="has no"):
        keras_kd.export.load(tmp_path)
    for threads, error in ((0, ValueError), ("2", TypeError)):
        with pytest.raises(error, match="threads"):
            keras_kd.export.load(report.best.path, threads=threads)


def test_files_of_a_fixed_batch_take_any_number_of_samples(tmp_path):
    model = keras.Sequential([keras.Input((5, 3), name="steps"), layers.LSTM(6, name="cell")])
    x = rng.normal(size=(7, 5, 3)).astype("float32")
    report = keras_kd.export(
        model, tmp_path / "cell", formats="tflite", precisions="float32", evaluation=x
    )
    loaded = keras_kd.export.load(report.folder)
    np.testing.assert_allclose(loaded(x), model.predict(x, verbose=0), atol=1e-5)
    assert loaded(x[:0]).shape == (0, 6)
