"""A quantization-aware model through the whole export: its learned ranges are the file's."""

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from ai_edge_litert.interpreter import Interpreter
from keras import layers

import keras_kd.export
from keras_kd import compress
from keras_kd.export.formats.onnx import quantization_aware

RNG = np.random.default_rng(5)
X = RNG.random((40, 8, 8, 2)).astype("float32")


@pytest.fixture(scope="module")
def aware():
    keras.utils.set_random_seed(2)
    image = keras.Input((8, 8, 2), name="image")
    x = layers.Conv2D(6, 3, padding="same", use_bias=False, name="conv")(image)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    x = layers.Conv2D(6, 3, activation="relu", name="second")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(image, layers.Dense(4, name="logits")(x), name="aware")
    return compress.quantize_aware(model, calibration=X)


@pytest.fixture(scope="module")
def made(aware, tmp_path_factory):
    report = keras_kd.export(
        aware,
        tmp_path_factory.mktemp("aware") / "out",
        precisions="int8",
        evaluation=X,
        max_drop=None,
    )
    assert report.manifest["model"]["quantization_aware"]
    assert report.manifest["calibration"] is None
    return {artifact.format: artifact for artifact in report.artifacts}


@pytest.mark.parametrize("bits", [8, 5, 4, 2])
def test_weights_of_any_trained_width_are_stored_as_integers(bits):
    weights = RNG.normal(size=(16, 6)).astype("float32")
    scale = np.abs(weights).max(axis=0) / np.float32(2 ** (bits - 1) - 1)
    trained = np.round(weights / scale) * scale
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 16])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 6])],
        [onnx.numpy_helper.from_array(trained, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    assert quantization_aware.quantize_on_grid(model) == 1
    kept = {entry.name: onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer}
    steps, step, zero = (kept[f"w__y__{part}"] for part in ("steps", "scale", "zero"))
    # Signed where no two of one sign exceed 16 bits with the largest input; 2 bits are +-127 here.
    assert steps.dtype == (np.int8 if bits in (4, 5) else np.uint8)
    assert steps.dtype == np.uint8 or 255 * 2 * np.abs(steps.astype(int)).max() < 2**15
    np.testing.assert_allclose((steps - zero.astype("float32")) * step, trained, rtol=1e-6)


def test_int8_tflite_is_within_two_steps_of_keras(aware, made):
    artifact = made["tflite"]
    assert artifact.passed, artifact.reason
    assert artifact.details["contents"]["float_operators"] == []
    interpreter = Interpreter(str(artifact.path))
    interpreter.allocate_tensors()
    (before,), (after,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert before["dtype"] == after["dtype"] == np.int8
    want = aware.predict(X, verbose=0)
    (scale, zero), (step, offset) = before["quantization"], after["quantization"]
    got = []
    for sample in X:
        x = np.clip(np.round(sample / scale) + zero, -128, 127)[None].astype("int8")
        interpreter.set_tensor(before["index"], x)
        interpreter.invoke()
        got.append((interpreter.get_tensor(after["index"])[0].astype("float32") - offset) * step)
    assert np.abs(np.stack(got) - want).max() <= 2.001 * step


def test_int8_onnx_keeps_the_learned_ranges_as_quantize_nodes(made):
    artifact = made["onnx"]
    assert artifact.passed, artifact.reason
    contents = artifact.details["contents"]
    assert contents["operators"]["QuantizeLinear"] >= 4
    assert contents["operators"]["DequantizeLinear"] >= contents["operators"]["QuantizeLinear"]
    assert contents["float_operators"] == []
    # Both convolutions and the last layer: 3*3*2*6 + 3*3*6*6 + 6*4 weights of one byte.
    assert contents["weight_bits"]["8"] >= 456
    # Every rounding is the one of the Keras model: what differs is the order of float sums.
    assert artifact.details["metrics"]["relative"] < 1e-3


def test_a_pruned_model_leaves_its_masks_behind(tmp_path):
    model = keras.Sequential([keras.Input((8,), name="x"), layers.Dense(16, name="y")])
    pruned = compress.prune(model, sparsity=0.5)
    x = RNG.random((10, 8)).astype("float32")
    report = keras_kd.export(
        pruned, tmp_path / "out", formats="onnx", precisions="float32", evaluation=x
    )
    (artifact,) = report.artifacts
    assert artifact.passed, artifact.reason
    # Weights (a bias of zeros goes away), and no mask of their size beside them.
    assert 4 * 8 * 16 <= artifact.details["contents"]["weight_bits"]["32"] <= 4 * (8 * 16 + 16)


def test_four_bit_weights_keep_the_grid_they_were_trained_on(tmp_path):
    keras.utils.set_random_seed(3)
    row = keras.Input((48,), name="row")
    hidden = layers.Dense(256, activation="relu", name="wide")(row)
    model = keras.Model(row, layers.Dense(64, name="deep")(hidden))
    x = RNG.normal(size=(40, 48)).astype("float32")
    report = keras_kd.export(
        compress.quantize_aware(model, weight_bits=4, activation_bits=None),
        tmp_path / "out",
        precisions=("weight_int8", "weight_int4"),
        evaluation=x,
        max_drop=None,
    )
    made = {f"{a.format} {a.precision}": a for a in report.artifacts}
    rounded = []
    for name in ("wide", "deep"):
        kernel = model.get_layer(name).get_weights()[0].astype("float64")
        step = np.abs(kernel).max(axis=0) / 7
        rounded.append(np.round(kernel / step) * step)
    expected = np.maximum(x @ rounded[0], 0.0) @ rounded[1]

    def sqnr(wanted, got):
        return 10 * np.log10(np.sum(wanted**2) / np.sum((wanted - got) ** 2))

    interpreter = Interpreter(str(made["tflite weight_int4"].path))
    (before,), (after,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(before["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(before["index"], x)
    interpreter.invoke()
    lite = interpreter.get_tensor(after["index"])
    session = onnxruntime.InferenceSession(str(made["onnx weight_int4"].path))
    (onnx,) = session.run(None, {session.get_inputs()[0].name: x})
    assert sqnr(expected, lite) > 80
    assert sqnr(expected, onnx) > 80
    # A uniform weight has 196 times the variance of its rounding to 7 steps: 23 dB a layer, and
    # 3 dB less for two.
    assert sqnr(model.predict(x, verbose=0), lite) > 18
    # 48 * 256 + 256 * 64 weights of half a byte in place of one.
    saved = made["tflite weight_int8"].bytes - made["tflite weight_int4"].bytes
    assert saved >= 0.45 * (48 * 256 + 256 * 64)
    assert made["onnx weight_int4"].bytes < made["tflite weight_int8"].bytes


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("between", ["resized", "averaged"])
def test_halves_are_rounded_as_in_keras(between, seed, tmp_path):
    """`QuantizeLinear` takes halves to the even integer; the model takes them as LiteRT does.

    With either seed the float means of four integers lie below some of the halves.
    """
    keras.utils.set_random_seed(4)
    image = keras.Input((6, 6, 3), name="image")
    x = layers.Conv2D(6, 3, padding="same")(image)
    if between == "resized":
        x = layers.UpSampling2D(2, interpolation="bilinear")(x)
    else:
        x = layers.AveragePooling2D(2)(x)
    model = keras.Model(image, layers.Conv2D(4, 1)(x))
    data = np.random.default_rng(seed).normal(size=(32, 6, 6, 3)).astype("float32")
    quantized = compress.quantize_aware(model, calibration=data)
    report = keras_kd.export(
        quantized, tmp_path / "out", precisions="int8", evaluation=data, max_drop=None
    )
    want = quantized.predict(data, verbose=0)
    step = np.diff(np.unique(want)).min()
    for artifact in report.artifacts:
        off = np.abs(keras_kd.export.load(artifact.path)(data) - want) / step
        # LiteRT's kernels may be two steps off, as `quantize_aware` says.
        assert off.max() <= (2.01 if artifact.format == "tflite" else 1.01), artifact.format
        assert np.mean(off > 0.5) < 0.01, artifact.format
