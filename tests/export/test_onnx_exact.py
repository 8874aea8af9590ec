"""Integer sums of ONNX files are the same on every x86 processor; proved here without one.

`MatMulInteger` by hand, worst cases by NumPy, files by the kernels that saturate, emulated.
"""

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from keras import layers
from onnx import TensorProto, helper, numpy_helper

import keras_kd.export
from keras_kd.compress import quantize_aware
from keras_kd.export.formats.onnx import exact_products

RNG = np.random.default_rng(11)


def widest(a, b):
    """Every sum of two products in 16 bits, one by one, as the manual of `vpmaddubsw` has it."""
    sums = np.zeros((len(a), b.shape[1]), np.int64)
    for row in range(len(a)):
        for column in range(b.shape[1]):
            for k in range(0, a.shape[1], 2):
                pair = sum(
                    int(a[row, i]) * int(b[i, column]) for i in range(k, min(k + 2, a.shape[1]))
                )
                sums[row, column] += min(max(pair, -32768), 32767)
    return sums


@pytest.mark.parametrize("depth", [1, 2, 7, 12])
def test_the_emulator_is_the_instruction(depth):
    a = RNG.integers(0, 256, (5, depth)).astype("uint8")
    b = RNG.integers(-128, 128, (depth, 6)).astype("int8")
    a[0], b[:, 0], b[:, 1] = 255, 127, -128
    np.testing.assert_array_equal(exact_products.saturating_product(a, b), widest(a, b))


def test_what_fits_never_saturates_in_any_order():
    for _ in range(30):
        weights = RNG.integers(-90, 91, (1, 9)).astype("int8")
        pairs = [
            255 * int(w[0]) + 255 * int(w[1])
            for i in range(9)
            for j in range(9)
            if i != j and (w := weights[0, [i, j]]) is not None
        ]
        inside = min(pairs) >= -32768 and max(pairs) <= 32767
        assert exact_products.fits(weights, 0) == inside


@pytest.mark.parametrize(
    ("weights", "fits"),
    [
        ([64, 64, -64, -64], True),
        ([65, 64, 0, 0], False),
        ([127, 1, 1, -127], True),
        ([-128, 0, 127, 0], True),
        ([-128, -1, 0, 0], False),
        ([127], True),
    ],
)
def test_the_limit_is_128_for_two_of_one_sign(weights, fits):
    column = np.array(weights, "int8")[:, None]
    assert exact_products.fits(column, 1) == fits
    assert exact_products.fits(column.T, 0) == fits


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (20, 8), (1, 8)])
def test_scales_are_the_finest_that_fit(shape):
    weights = RNG.normal(size=shape).astype("float32")
    # One far outlier leaves 8 bits, two of a kind leave 7, a channel of zeros has any scale.
    flat = weights.reshape(-1, 8)
    flat[0, 0], flat[:, 2] = 1e3, 0.0
    scales = exact_products.fitting_scales(weights, weights.ndim - 1)
    steps = exact_products.rounded(weights, scales)
    assert exact_products.fits(steps, weights.ndim - 1)
    assert np.abs(steps * scales - weights).max() <= scales.max() / 2 * 1.0001
    for channel in range(8):
        ends = np.sort(flat[:, channel].astype("float64"))
        two = max(ends[-2:].clip(0).sum(), -ends[:2].clip(None, 0).sum())
        least = max(np.abs(ends).max() / 127, two / 128)
        if least:
            assert least * 0.9999 <= scales[channel] <= least * 1.02
    assert scales[0] == pytest.approx(1e3 / 127, rel=0.02)


def product(weights, activations="uint8", zero=None):
    zero = np.zeros((), weights.dtype) if zero is None else zero
    kind = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8}[activations]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "", "z"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", kind, ["n", len(weights)])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["n", weights.shape[1]])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(zero, "z")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model, feed):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)


def test_a_bad_file_is_found_and_mended():
    weights = RNG.integers(-128, 128, (32, 8)).astype("int8")
    weights[:, 0] = 127
    model = product(weights)
    x = np.full((3, 32), 255, "uint8")
    exact = x.astype("int64") @ weights.astype("int64")
    assert (exact_products.saturating_product(x, weights) != exact).any()
    with pytest.raises(ValueError, match=r"without VNNI: at `y` \(two of its signed weights"):
        exact_products.prove(model)
    assert exact_products.make_unsigned(model) == 1
    assert exact_products.prove(model) == {"uint8": 1}
    # Unsigned by unsigned bytes are exact wherever this runs.
    np.testing.assert_array_equal(run(model, {"x": x})[0], exact)


def test_signed_weights_that_fit_are_exact_wherever_this_runs():
    weights = RNG.integers(-64, 65, (37, 16)).astype("int8")
    weights[:, 0], weights[:, 1] = 64, -64
    model = product(weights)
    assert exact_products.prove(model) == {"int8": 1}
    for rows in (1, 5):
        x = np.vstack([np.full((1, 37), 255), RNG.integers(0, 256, (rows - 1, 37))]).astype("uint8")
        np.testing.assert_array_equal(
            run(model, {"x": x})[0], x.astype("int64") @ weights.astype("int64")
        )


def between(weights, operator, second="uint8"):
    """`Q, DQ, operator, Q, DQ` with float weights, or with a second activation for `None`."""
    shape = {"Conv": ["n", 4, 6, 6], "Gemm": ["n", 4], "MatMul": ["n", 4, 4]}[operator]
    scale, zero = np.float32(0.02), np.array(128, second)
    free = [f"y{i}" for i in range(len(shape))]
    names = ["x", "s", "z"]
    nodes = [
        helper.make_node("QuantizeLinear", names, ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node(operator, ["d", "d" if weights is None else "w"], ["p"]),
        helper.make_node("QuantizeLinear", ["p", "s", "z"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "s", "z"], ["y"]),
    ]
    values = [numpy_helper.from_array(np.array(scale), "s"), numpy_helper.from_array(zero, "z")]
    if weights is not None:
        values.append(numpy_helper.from_array(weights, "w"))
    graph = helper.make_graph(
        nodes,
        "between",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, free)],
        values,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(("operator", "shape"), [("Conv", (5, 4, 3, 3)), ("Gemm", (4, 5))])
def test_float_weights_between_integers_stay_float(operator, shape):
    """ONNX Runtime rounds them by itself; a scale for each channel of the input stops it."""
    # One scale for all five channels would leave nothing of the first.
    channels = [1] * len(shape)
    channels[shape.index(5)] = 5
    weights = RNG.normal(size=shape) * np.logspace(-3, 0, 5).reshape(channels)
    model = between(weights.astype("float32"), operator)
    with pytest.raises(ValueError, match="rounds its float weights by itself"):
        exact_products.prove(model)
    x = {"x": RNG.normal(size=(3, 4, 6, 6) if operator == "Conv" else (3, 4)).astype("float32")}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(model.SerializeToString(), options)
    assert exact_products.keep_float(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert exact_products.prove(model) == {}
    (want,) = plain.run(None, x)
    (got,) = run(model, x)
    # At most one value in a hundred lies where two orders of a float sum round apart.
    assert np.mean(np.abs(want - got) > 1e-6) < 0.01


def test_products_of_two_activations_must_be_unsigned():
    assert exact_products.prove(between(None, "MatMul")) == {"uint8": 1}
    model = between(None, "MatMul", "uint8")
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array(0, "int8"), "z"))
    with pytest.raises(ValueError, match="signed bytes that is no constant"):
        exact_products.prove(model)


def cnn():
    return keras.Sequential(
        [
            keras.Input((8, 8, 2), name="image"),
            layers.Conv2D(8, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, activation="relu"),
            layers.Conv2D(6, 1, activation="relu"),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )


def recurrent():
    return keras.Sequential(
        [
            keras.Input((6, 5), name="steps"),
            layers.LSTM(8, return_sequences=True),
            layers.GRU(6),
            layers.Dense(3),
        ]
    )


def attention():
    rows = keras.Input((6, 16), name="rows")
    x = layers.Dense(16)(rows)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 8)(x, x))
    return keras.Model(rows, layers.Dense(5)(layers.GlobalAveragePooling1D()(x)))


def matrices(model):
    """The signed weights of a file as matrices `(depth, outputs)`."""
    values = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        for name in node.input:
            if name in makers and makers[name].op_type == "DequantizeLinear":
                name = makers[name].input[0]
            weights = values.get(name)
            if weights is None or weights.dtype != np.int8 or weights.ndim < 2:
                continue
            if "Conv" in node.op_type:
                yield np.moveaxis(weights, 0, -1).reshape(-1, len(weights))
            elif weights.ndim == 2:
                yield weights


def check_emulated(model):
    """What processors without VNNI compute with the weights of a file, in any order, is exact."""
    found = list(matrices(model))
    for weights in found:
        for _ in range(4):
            mixed = weights[RNG.permutation(len(weights))]
            x = RNG.choice([0, 1, 254, 255], (6, len(mixed))).astype("uint8")
            # The largest input where weights are of one sign, nothing where they are of the other.
            x[0], x[1] = 255 * (mixed[:, 0] > 0), 255 * (mixed[:, 0] < 0)
            np.testing.assert_array_equal(
                exact_products.saturating_product(x, mixed),
                x.astype("int64") @ mixed.astype("int64"),
            )
    return found


@pytest.fixture(scope="module", params=[cnn, recurrent, attention])
def made(request, tmp_path_factory):
    keras.utils.set_random_seed(4)
    model = request.param()
    x = RNG.normal(size=(24, *model.inputs[0].shape[1:])).astype("float32")
    folder = tmp_path_factory.mktemp(request.param.__name__)
    plain = keras_kd.export(
        model,
        folder / "plain",
        "onnx",
        ("int8", "int8_qoperator", "dynamic"),
        calibration=x,
        evaluation=x,
        max_drop=None,
    )
    aware = quantize_aware(model, calibration=x)
    trained = keras_kd.export(aware, folder / "aware", "onnx", "int8", evaluation=x, max_drop=None)
    return request.param.__name__, aware, x, plain, trained


def test_every_exported_file_is_exact_on_every_processor(made):
    plain, trained = made[3:]
    for report in (plain, trained):
        for artifact in report.artifacts:
            assert artifact.passed, artifact.reason
            model = onnx.load(artifact.path)
            counts = exact_products.prove(model)
            facts = artifact.details["integer_products"]
            assert facts["weights"] == counts
            assert sum(counts.values()) > 0
            assert {"AVX2", "AVX-512"} <= set(facts["computed"])
            assert facts["ran"]
            check_emulated(model)
            assert artifact.processors() in report.save_card(report.folder / "c.md").read_text()
    text = plain.table().replace("\n    ", " ")
    assert "onnx int8, int8_qoperator, dynamic: the same sums on every x86 processor" in text


def test_the_float_arithmetic_of_a_file_is_what_its_kernels_compute(made):
    """Fused or not: on processors that would saturate, this is where it shows."""
    for report in made[3:]:
        for artifact in report.artifacts:
            if artifact.precision != "int8":
                continue
            outputs = []
            for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
                options = onnxruntime.SessionOptions()
                options.graph_optimization_level = getattr(
                    onnxruntime.GraphOptimizationLevel, level
                )
                session = onnxruntime.InferenceSession(artifact.path, options)
                outputs += session.run(None, {session.get_inputs()[0].name: made[2]})
            # Kernels round halves otherwise; sums that saturate leave 9 to 23 dB.
            assert keras_kd.export.verification.metrics.sqnr(*outputs) > 30


@pytest.mark.skipif(keras.config.backend() == "torch", reason="needs torch's own exporter")
def test_what_keras_exports_of_quantized_models_multiplies_no_integers(made, tmp_path):
    _, aware, x, _, _ = made
    aware.export(str(tmp_path / "model.onnx"), format="onnx", verbose=False)
    model = onnx.load(tmp_path / "model.onnx")
    assert exact_products.products(model) == []
    (outputs,) = run(model, {model.graph.input[0].name: x})
    assert keras_kd.export.verification.metrics.sqnr(aware.predict(x, verbose=0), outputs) > 35


def test_seven_bit_training_gives_signed_weights(tmp_path):
    model = cnn()
    x = RNG.normal(size=(24, 8, 8, 2)).astype("float32")
    aware = quantize_aware(model, weight_bits=7, calibration=x)
    (artifact,) = keras_kd.export(
        aware, tmp_path / "out", "onnx", "int8", evaluation=x, max_drop=None
    ).artifacts
    assert set(artifact.details["integer_products"]["weights"]) == {"int8"}
    assert len(check_emulated(onnx.load(artifact.path))) >= 4


def test_layers_kept_float_are_not_rounded_by_the_runtime(tmp_path):
    """`mixed` leaves a layer in float between integer ones, where the runtime would round it."""
    keras.utils.set_random_seed(5)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2), name="image"),
            *(layers.Conv2D(6, 3, activation="relu", name=f"conv{i}") for i in range(3)),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, name="logits"),
        ]
    )
    # One filter a thousand times the others: of one scale for all, these would get nothing.
    kernel, bias = model.get_layer("conv1").get_weights()
    kernel[..., 0] *= 1000
    model.get_layer("conv1").set_weights([kernel, bias])
    x = RNG.random((24, 8, 8, 2)).astype("float32")
    report = keras_kd.export(
        model, tmp_path / "out", "onnx", ("float32", "int8"), calibration=x, evaluation=x,
        max_drop=0.0,
    )  # fmt: skip
    for artifact in report.artifacts:
        if artifact.path is not None:
            exact_products.prove(onnx.load(artifact.path))


WORDS = {
    "convolution": lambda x: layers.Conv1D(8, 3, activation="gelu")(x),
    "image": lambda x: layers.Conv2D(8, 3)(layers.Reshape((8, 8, 1))(x)),
    "both": lambda x: layers.Concatenate()(
        [layers.Flatten()(layers.Conv1D(8, 3)(x)), layers.Flatten()(layers.Dense(8)(x))]
    ),
    "dense": lambda x: layers.Dense(8, activation="gelu")(x),
}


def test_embeddings_that_convolutions_read_stay_float_in_dynamic_files(tmp_path):
    """Behind a table of bytes ONNX Runtime would round the weights of the convolution."""
    x = RNG.integers(0, 16, (8, 16)).astype("int32")
    for name, middle in WORDS.items():
        words = keras.Input((16,), dtype="int32", name="words")
        y = middle(layers.Embedding(16, 4, name="embed")(words))
        model = keras.Model(words, layers.Dense(4)(layers.Flatten()(y)))
        report = keras_kd.export(
            model, tmp_path / name, "onnx", "dynamic", evaluation=x, max_drop=None
        )
        (artifact,) = report.artifacts
        assert artifact.passed, artifact.reason
        file = onnx.load(artifact.path)
        floats = {
            entry.data_type for entry in file.graph.initializer if list(entry.dims) == [16, 4]
        }
        assert floats == {TensorProto.UINT8 if name == "dense" else TensorProto.FLOAT}
        # The last layer is always of integers.
        assert "uint8" in exact_products.prove(file)
        plain = onnxruntime.SessionOptions()
        plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        got = [
            onnxruntime.InferenceSession(artifact.path, options).run(None, {"words": x})[0]
            for options in (None, plain)
        ]
        np.testing.assert_allclose(*got, rtol=0, atol=1e-4)
