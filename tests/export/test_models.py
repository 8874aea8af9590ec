"""Kinds of models that converters are known to fail on, each exported to both formats."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_kd.export

rng = np.random.default_rng(7)
IMAGES = rng.random((24, 8, 8, 3)).astype("float32")
STEPS = rng.normal(size=(24, 3, 5)).astype("float32")
CLASSES = rng.integers(0, 3, 24)


def export(model, x, folder, **kwargs):
    settings = {"precisions": ("float32", "int8"), "max_drop": None, **kwargs}
    keras_kd.export(model, folder, calibration=x, evaluation=x, **settings)
    return {
        f"{artifact.format} {artifact.precision}": artifact
        for artifact in keras_kd.export.Report.load(folder).artifacts
    }


def everything():
    """Several inputs and outputs as dicts; GELU, Normalization, attention, einsum, nesting."""
    image = keras.Input((8, 8, 3), name="image")
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    x = layers.Normalization(mean=[0.5, 0.4, 0.3], variance=[0.1, 0.2, 0.3])(image)
    block = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.SeparableConv2D(6, 3),
            layers.BatchNormalization(),
            layers.Activation("gelu"),
        ],
        name="block",
    )
    x = layers.GlobalAveragePooling2D()(block(x))
    t = layers.Embedding(20, 6)(tokens)
    t = layers.LayerNormalization()(t + layers.MultiHeadAttention(2, 3)(t, t))
    t = layers.EinsumDense("abc,cd->abd", output_shape=(6, 4), bias_axes="d")(t)
    t = ops.einsum("btd,bsd->bts", t, t)
    t = layers.GlobalMaxPooling1D()(layers.Conv1D(4, 3, activation="relu")(t))
    both = layers.Concatenate()([x, t])
    return keras.Model(
        {"image": image, "tokens": tokens},
        {"kind": layers.Dense(3, name="a")(both), "value": layers.Dense(1, name="b")(both)},
    )


def test_everything_at_once_exports_in_both_formats(tmp_path):
    x = {"image": IMAGES, "tokens": rng.integers(0, 20, (24, 6))}
    made = export(everything(), x, tmp_path / "out")
    for name, artifact in made.items():
        assert artifact.passed, (name, artifact.reason)
        signature = artifact.details["signature"]
        assert {t["name"] for t in signature["inputs"]} == {"image", "tokens"}
        assert {t["name"] for t in signature["outputs"]} == {"kind", "value"}
        assert artifact.batch == "dynamic"
        assert artifact.details["contents"]["flex"] == []
        assert artifact.sqnr > (90 if "float32" in name else 15)
    # Token numbers are no quantity to scale.
    tokens = [
        t for t in made["tflite int8"].details["signature"]["inputs"] if t["name"] == "tokens"
    ]
    assert tokens[0]["dtype"] == "int32"


def test_recurrent_layers(tmp_path):
    steps = keras.Input((3, 5), name="steps")
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(steps)
    model = keras.Model(steps, layers.Dense(3, name="kind")(layers.GRU(4)(x)))
    made = export(model, STEPS, tmp_path / "out")
    for name, artifact in made.items():
        assert artifact.passed, (name, artifact.reason)
        assert artifact.details["contents"]["flex"] == []
    assert made["tflite float32"].batch == "static"
    assert made["tflite int8"].batch == "dynamic"
    assert "unrolled" in made["tflite int8"].details["notes"][0]


def test_weight_only_precisions_of_a_bidirectional_layer(tmp_path):
    # The converter names the inner graphs of both directions alike.
    steps = keras.Input((3, 5), name="steps")
    x = layers.Bidirectional(layers.LSTM(4))(steps)
    model = keras.Model(steps, layers.Dense(3, name="kind")(x))
    precisions = ("weight_int8", "weight_int4")
    made = export(model, STEPS, tmp_path / "out", precisions=precisions, formats="tflite")
    for precision, least in zip(precisions, (30, 10), strict=True):
        artifact = made[f"tflite {precision}"]
        assert artifact.passed, artifact.reason
        assert artifact.sqnr > least


def test_int16x8_of_integer_inputs_says_what_to_take(tmp_path):
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(20, 4)(tokens))
    model = keras.Model(tokens, layers.Dense(3, name="kind")(x))
    x = rng.integers(0, 20, (24, 6))
    made = export(model, x, tmp_path / "out", precisions=("int8", "int16x8"), formats="tflite")
    assert made["tflite int8"].passed, made["tflite int8"].reason
    refused = made["tflite int16x8"]
    assert refused.status == "failed"
    assert "integers, such as `tokens`. Take int8" in refused.reason


class Unsavable(keras.Model):
    """A subclass that no other process can rebuild: its constructor takes a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.recurrent = layers.LSTM(4)
        self.head = layers.Dense(3)

    def call(self, inputs):
        return {"kind": self.head(self.function(self.recurrent(inputs["steps"])))}


def test_a_converter_crash_costs_one_artifact(tmp_path):
    # Calibrating a loop of fixed batch is a segmentation fault in the converter.
    model = Unsavable(lambda x: 2 * x)
    model({"steps": STEPS})
    made = export(model, {"steps": STEPS}, tmp_path / "out")
    crashed = made.pop("tflite int8")
    assert crashed.status == "failed"
    assert "crashed (signal 11, SIGSEGV)" in crashed.reason
    assert crashed.path is None
    for name, artifact in made.items():
        assert artifact.passed, (name, artifact.reason)
        assert artifact.details["signature"]["inputs"][0]["name"] == "steps"
        assert artifact.details["signature"]["outputs"][0]["name"] == "kind"
    best = keras_kd.export.Report.load(tmp_path / "out").best
    assert best.file in {artifact.file for artifact in made.values()}


def test_mixed_precision_models_are_exported_in_float32(tmp_path):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        image = keras.Input((8, 8, 3), name="image")
        x = layers.Conv2D(4, 3, activation="relu")(image)
        x = layers.GlobalAveragePooling2D()(layers.BatchNormalization()(x))
        model = keras.Model(image, layers.Dense(3, dtype="float32", name="kind")(x))
    finally:
        keras.config.set_dtype_policy(policy)
    made = export(model, IMAGES, tmp_path / "out", precisions="float32")
    for artifact in made.values():
        assert artifact.passed, artifact.reason
        assert artifact.details["signature"]["inputs"][0]["dtype"] == "float32"


def test_a_free_image_size_stays_free(tmp_path):
    image = keras.Input((None, None, 3), name="image")
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, activation="relu")(image))
    model = keras.Model(image, layers.Dense(3, activation="softmax", name="kind")(x))
    made = export(model, IMAGES, tmp_path / "out", precisions="float32", formats="onnx")
    assert made["onnx float32"].passed
    shape = made["onnx float32"].details["signature"]["inputs"][0]["shape"]
    assert shape == ["batch", "image_1", "image_2", 3]


def test_every_precision(tmp_path, student, blobs):
    x, y = blobs
    report = keras_kd.export(
        student,
        tmp_path / "out",
        precisions=("float32", "weight_int8", "weight_int4", "int8", "int16x8", "int8_qoperator"),
        calibration=x[:100],
        evaluation=(x[200:], y[200:]),
        max_drop=0.5,
        opset=15,
    )
    made = {f"{a.format} {a.precision}": a for a in report.artifacts}
    assert list(made) == [
        *("tflite float32", "tflite weight_int8", "tflite weight_int4", "tflite int8"),
        *("tflite int16x8", "onnx float32", "onnx weight_int4", "onnx int8", "onnx int8_qoperator"),
    ]
    for name, artifact in made.items():
        assert artifact.passed, (name, artifact.reason)
    assert made["tflite weight_int4"].bytes < made["tflite weight_int8"].bytes
    assert made["tflite weight_int8"].bytes < 0.5 * made["tflite float32"].bytes
    assert "4" in made["tflite weight_int4"].details["contents"]["weight_bits"]
    assert made["tflite int16x8"].details["signature"]["inputs"][0]["dtype"] == "int16"
    assert "MatMulNBits" in made["onnx weight_int4"].details["contents"]["operators"]
    assert "QLinearConv" in made["onnx int8_qoperator"].details["contents"]["operators"]
    note = made["tflite int8"].details["notes"][0]
    assert "chosen by SQNR on the calibration data" in note
    assert "ai-edge-quantizer" in note
    layers_ = report.layers()
    assert {row["format"] for row in layers_.rows()} == {"tflite", "onnx"}
    assert {"logits"} <= {row["layer"] for row in layers_.rows()}
    assert all(10 < row["sqnr"] < 80 for row in layers_.rows() if row["sqnr"] is not None)
    assert max(map(len, layers_.table().splitlines())) <= 80


@pytest.mark.parametrize("opset", [12, 19])
def test_opsets_out_of_range_are_refused(student, tmp_path, opset):
    with pytest.raises(ValueError, match=r"`opset` must lie in 13\.\.18"):
        keras_kd.export(student, tmp_path / "out", evaluation=IMAGES, opset=opset)


def test_layers_that_int8_cannot_hold_stay_float(tmp_path):
    """One value in the thousands widens a range until the small ones, which decide, are lost.

    The layer after it shows the loss, the layer itself does not; both must be float.
    """
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), name="x")
    x = layers.Dense(8, activation="relu", name="first")(inputs)
    x = layers.Dense(8, activation="relu", name="wide")(x)
    x = layers.Dense(8, activation="relu", name="reader")(x)
    x = layers.Dense(8, activation="relu", name="third")(x)
    model = keras.Model(inputs, layers.Dense(3, name="logits")(x))
    kernel, bias = model.get_layer("wide").get_weights()
    bias[0] = 5000.0
    model.get_layer("wide").set_weights([kernel, bias])
    kernel, bias = model.get_layer("reader").get_weights()
    kernel[0] = 0.0
    model.get_layer("reader").set_weights([kernel, bias])
    x = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
    y = model.predict(x, verbose=0).argmax(-1)
    report = keras_kd.export(
        model,
        tmp_path / "out",
        precisions=("float32", "int8"),
        calibration=x,
        evaluation=(x, y),
        max_drop=0.15,
    )
    made = {f"{a.format} {a.precision}": a for a in report.artifacts}
    noise = report.layers()
    assert noise.names() == ["first", "wide", "reader", "third", "logits"]
    for fmt in ("tflite", "onnx"):
        by_layer = {row["layer"]: row for row in noise.rows() if row["format"] == fmt}
        assert by_layer["reader"]["reads"] == ["wide"]
        assert by_layer["wide"]["sqnr"] > 30
        assert max(by_layer[name]["sqnr"] for name in ("reader", "third", "logits")) < 10
        assert noise.worst(fmt)[0] == "reader"
        assert made[f"{fmt} int8"].details["stage"] == "budget"
        mixed = made[f"{fmt} mixed"]
        assert mixed.passed, mixed.reason
        assert mixed.details["kept"] == ["wide", "reader"]
        assert mixed.details["metrics"]["accuracy"] > 0.85
        contents = mixed.details["contents"]
        # Two layers of 8 by 8 in float, the other three in int8.
        assert contents["weight_bits"]["32"] >= 4 * 2 * 64
        assert contents["weight_bits"]["8"] >= 4 * 8 + 8 * 8 + 8 * 3
    assert report.best.precision in ("mixed", "float32")


def test_what_stays_float_brings_the_layers_fused_with_it(tmp_path):
    """A ReLU that loses the signal inherits it from the convolution and BatchNorm before it."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 1), name="x")
    x = layers.Conv2D(8, 3, activation="relu", name="wide")(inputs)
    x = layers.BatchNormalization(name="norm")(layers.DepthwiseConv2D(3, name="reader")(x))
    x = layers.Flatten(name="flat")(layers.ReLU(name="relu")(x))
    model = keras.Model(inputs, layers.Dense(3, name="logits")(x))
    for name, factor in (("wide", 3000.0), ("reader", 1 / 3000.0)):
        kernel, bias = model.get_layer(name).get_weights()
        kernel[:, :, 0] *= factor if name == "reader" else 1
        kernel[..., 0] *= factor if name == "wide" else 1
        model.get_layer(name).set_weights([kernel, bias])
    x = np.random.default_rng(0).random((64, 6, 6, 1)).astype("float32")
    y = model.predict(x, verbose=0).argmax(-1)
    report = keras_kd.export(
        model,
        tmp_path / "out",
        formats="onnx",
        precisions=("float32", "int8"),
        calibration=x,
        evaluation=(x, y),
    )
    rows = {row["layer"]: row for row in report.layers().rows()}
    assert rows["relu"]["reads"] == ["wide"]
    assert rows["relu"]["covers"] == ["reader", "norm"]
    mixed = report.artifacts[-1]
    assert mixed.passed, mixed.reason
    assert mixed.details["kept"] == ["wide", "reader", "norm", "relu"]
    assert mixed.sqnr > 30
    assert "relu (with reader, norm)" in report.layers().table()
