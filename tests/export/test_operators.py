"""Operators that the converters know by another name, and what is said of those they do not."""

import re

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from keras import layers, ops

import keras_kd.export
from keras_kd.export.formats import reasons, runtime
from keras_kd.export.formats.onnx import contents
from keras_kd.export.formats.onnx import graph as onnx_graph

RNG = np.random.default_rng(7)
X = RNG.normal(size=(16, 8, 8, 6)).astype("float32")

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="the graphs are those of TensorFlow"
)


def exported(model, folder, **options):
    options = {"precisions": ("float32", "float16"), "evaluation": X, "max_drop": None, **options}
    report = keras_kd.export(model, folder / "out", **options)
    return {f"{a.format} {a.precision}": a for a in report.artifacts}


def grouped_by_hand(x, kernel, bias, groups):
    """A valid convolution with groups, channel by channel."""
    size, width = kernel.shape[0], kernel.shape[2]
    per, reach = kernel.shape[3] // groups, x.shape[1] - size + 1
    y = np.zeros((len(x), reach, reach, kernel.shape[3]))
    for out in range(kernel.shape[3]):
        first = (out // per) * width
        for i in range(reach):
            for j in range(reach):
                patch = x[:, i : i + size, j : j + size, first : first + width]
                y[:, i, j, out] = np.sum(patch * kernel[..., out], axis=(1, 2, 3)) + bias[out]
    return y


def test_grouped_convolutions_convert(tmp_path):
    image = keras.Input((8, 8, 6), name="image")
    model = keras.Model(image, layers.Conv2D(6, 3, groups=3, name="grouped")(image))
    kernel, bias = RNG.normal(size=(3, 3, 2, 6)).astype("float32"), np.arange(6.0)
    model.layers[-1].set_weights([kernel, bias])
    made = exported(model, tmp_path, precisions=("float32", "int8"), calibration=X)
    want = grouped_by_hand(X.astype("float64"), kernel, bias, 3)
    artifact = made["onnx float32"]
    assert artifact.passed, artifact.reason
    session = onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"image": X})[0], want, atol=1e-4)
    (conv,) = [n for n in onnx.load(artifact.path).graph.node if n.op_type == "Conv"]
    assert next(a.i for a in conv.attribute if a.name == "group") == 3
    for name, other in made.items():
        assert other.passed, (name, other.reason)
        assert other.sqnr > 25


def test_transposed_kernels_shorter_than_strides_and_groups_over_volumes_convert(tmp_path):
    volume = keras.Input((2, 4, 4, 4), name="volume")
    flat = layers.Reshape((8, 4, 4))(volume)
    grouped = layers.Conv3D(8, 2, groups=4, activation="relu", padding="same")(volume)
    outputs = {
        "short": layers.Conv2DTranspose(3, 1, strides=3, padding="same")(flat),
        "padded": layers.Conv2DTranspose(3, (1, 3), strides=(4, 2), output_padding=(3, 1))(flat),
        "volume_up": layers.Conv3DTranspose(2, 1, strides=2)(volume),
        "grouped": layers.Conv3D(6, 2, groups=2)(grouped),
    }
    model = keras.Model(volume, outputs)
    x = RNG.normal(size=(5, 2, 4, 4, 4)).astype("float32")
    options = {"evaluation": x, "precisions": ("float32",), "formats": "onnx"}
    (artifact,) = exported(model, tmp_path, **options).values()
    assert artifact.passed, artifact.reason
    onnx.checker.check_model(str(artifact.path), full_check=True)
    for name, got in keras_kd.export.load(artifact.path)(x).items():
        np.testing.assert_allclose(got, outputs_of(model, x)[name], atol=1e-5)


def outputs_of(model, x):
    return {name: keras.ops.convert_to_numpy(y) for name, y in model(x).items()}


@pytest.mark.parametrize("operation", [lambda x: ops.transpose(x, (1, 0, 2)), ops.mean])
def test_samples_on_another_axis_are_refused_before_work(operation, tmp_path):
    inputs = keras.Input((4, 3))
    model = keras.Model(inputs, operation(inputs))
    with pytest.raises(ValueError, match="samples on its first axis"):
        keras_kd.export(model, tmp_path / "out", evaluation=np.zeros((2, 4, 3), "float32"))
    assert not (tmp_path / "out").exists()


def test_what_xnnpack_refuses_is_told_by_its_operator():
    """A first feature of 1e6 sets the input's scale, and the product behind it brings it back."""
    tf = pytest.importorskip("tensorflow")
    from keras_kd.export.formats.tflite import xnnpack
    from keras_kd.export.formats.tflite.runtime import TFLiteRuntime

    x = RNG.normal(size=(16, 4)).astype("float32") * np.array([1e6, 1, 1, 1], "float32")

    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2, name="brought_back")(inputs))
    model.set_weights([np.array([[1e-6] * 2, [1.0] * 2, [1.0] * 2, [1.0] * 2]), np.zeros(2)])
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([row[None]] for row in x)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    blob = converter.convert()
    message = xnnpack.refused(blob, RuntimeError("(TfLiteXNNPackDelegate) failed to prepare"))
    assert re.search("`FULLY_CONNECTED` at `.*XNNPACK takes less than 256", message)
    with pytest.raises((RuntimeError, ValueError), match="XNNPACK takes less than 256"):
        runtime = TFLiteRuntime(blob)
        (given,) = runtime.signature()["inputs"]
        runtime.run({given["name"]: x})
    assert xnnpack.refused(blob, RuntimeError("another fault")) is None


def test_groups_in_one_dimension_and_functions_for_xla_convert(tmp_path):
    class Doubled(layers.Layer):
        def call(self, inputs):
            import tensorflow as tf

            @tf.function(jit_compile=True)
            def twice(values):
                return tf.nn.relu(values) * 2.0

            return twice(inputs)

    image = keras.Input((8, 8, 6), name="image")
    x = layers.Reshape((64, 6))(image)
    x = layers.Conv1D(4, 3, groups=2, padding="same")(x)
    model = keras.Model(image, Doubled(name="doubled")(x))
    made = exported(model, tmp_path, formats="onnx")
    for artifact in made.values():
        assert artifact.passed, artifact.reason


def test_classes_as_outputs_convert_in_both_formats(tmp_path):
    image = keras.Input((8, 8, 6), name="image")
    scores = layers.Dense(5, name="scores")(layers.GlobalAveragePooling2D()(image))
    made = exported(
        keras.Model(
            image,
            {
                "scores": scores,
                "best": ops.argmax(scores, axis=-1),
                "least": ops.argmin(scores, axis=-1, keepdims=True),
            },
        ),
        tmp_path,
    )
    for name, artifact in made.items():
        assert artifact.passed, (name, artifact.reason)
        got = runtime.open_file(artifact.path).run({"image": X[:1]})
        assert got["best"].dtype == np.int32
        assert got["best"][0] == got["scores"][0].argmax()
        assert got["least"][0, 0] == got["scores"][0].argmin()


def test_sizes_of_resized_images_are_those_that_were_asked_for(tmp_path):
    # 6 * float32(5 / 6) is 4.9999999, and ONNX takes the floor of it.
    sizes = [(7, 5), (5, 6), (11, 13), (3, 3)]
    image = keras.Input((8, 6, 3), name="image")
    model = keras.Model(
        image,
        {
            f"{mode} {h} {w}": layers.Resizing(h, w, interpolation=mode)(image)
            for h, w in sizes
            for mode in ("bilinear", "nearest")
        },
    )
    assert any(np.floor(6 * float(np.float32(w / 6))) < w for _, w in sizes)
    x = RNG.normal(size=(5, 8, 6, 3)).astype("float32")
    want = model.predict(x, verbose=0)
    for batch in (None, 1):
        made = exported(
            model, tmp_path / str(batch), formats="onnx", precisions="float32", evaluation=x,
            batch=batch,
        )  # fmt: skip
        assert made["onnx float32"].passed, made["onnx float32"].reason
        got = keras_kd.export.load(made["onnx float32"].path)(x)
        for name, array in want.items():
            np.testing.assert_allclose(got[name], array, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("precision", ["int8", "int8_qoperator"])
def test_interpolated_bytes_are_rounded_and_not_cut_off(tmp_path, precision):
    """In all versions of ONNX Runtime: old ones drop what stands around a `Resize` of one scale."""
    image = keras.Input((8, 6, 4), name="image")
    x = layers.Conv2D(4, 1, activation="relu6", name="mix")(image)
    # ONNX Runtime multiplies by an operator of its own, behind which nothing says the shape.
    x = layers.Multiply(name="square")([x, x])
    x = layers.UpSampling2D(2, interpolation="bilinear", name="up")(x)
    model = keras.Model(image, layers.Conv2D(4, 1, name="last")(x))
    for name in ("mix", "last"):
        model.get_layer(name).set_weights([np.eye(4)[None, None], np.zeros(4)])
    data = RNG.uniform(0, 2, size=(20, 8, 6, 4)).astype("float32")
    # Both ends of the range are left as they are, so that all have one scale.
    data[:, :, :, 0], data[:, :, :, 1] = 0, 2
    made = exported(
        model, tmp_path, formats="onnx", precisions=precision, evaluation=data, calibration=data
    )[f"onnx {precision}"]
    graph = onnx.load(made.path).graph
    values = {e.name: onnx.numpy_helper.to_array(e) for e in graph.initializer}
    made_by = {node.output[0]: node for node in graph.node}
    read_by = {name: node for node in graph.node for name in node.input}
    (resize,) = [node for node in graph.node if node.op_type == "Resize"]
    before, behind = made_by[resize.input[0]], read_by[resize.output[0]]
    assert (before.op_type, behind.op_type) == ("DequantizeLinear", "QuantizeLinear")
    assert values[before.input[1]].tolist() == [float(values[behind.input[1]])] * 4
    got = keras_kd.export.load(made.path)(data)
    step = np.diff(np.unique(got)).min()
    # Cut off, the answers lie half a step below on average.
    assert abs(np.mean(got - model.predict(data, verbose=0))) < 0.1 * step


def test_zeros_around_what_is_pooled_count(tmp_path):
    """ONNX Runtime 1.20 to 1.31 takes a `Pad` into the `MaxPool` behind it, and its zeros away."""
    image, row = keras.Input((6, 6, 2), name="image"), keras.Input((7, 2), name="row")
    padded = layers.ZeroPadding2D(1)(image)
    model = keras.Model(
        [image, row],
        {
            "largest": layers.MaxPooling2D(3, strides=2)(padded),
            "mean": layers.AveragePooling2D(3, strides=2)(layers.ZeroPadding2D((1, 2))(image)),
            "line": layers.MaxPooling1D(3, strides=1)(layers.ZeroPadding1D((2, 0))(row)),
        },
    )
    # All are negative, so that a zero is the largest.
    rng = np.random.default_rng(5)
    x, z = (-rng.uniform(1, 2, (9, *shape)).astype("float32") for shape in ((6, 6, 2), (7, 2)))
    made = exported(
        model, tmp_path, formats="onnx", precisions=("float32", "float16", "int8"),
        evaluation=[x, z], calibration=[x, z],
    )  # fmt: skip
    large = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    wide = np.pad(x, ((0, 0), (1, 1), (2, 2), (0, 0)))
    long = np.pad(z, ((0, 0), (2, 0), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view
    want = {
        "largest": windows(large, (3, 3), (1, 2))[:, ::2, ::2].max(axis=(-1, -2)),
        "mean": windows(wide, (3, 3), (1, 2))[:, ::2, ::2].mean(axis=(-1, -2)),
        "line": windows(long, 3, 1).max(axis=-1),
    }
    for name, artifact in made.items():
        assert artifact.passed, (name, artifact.reason)
        got = keras_kd.export.load(artifact.path)([x, z])
        for output, array in want.items():
            close = 1e-6 if "32" in name else 2e-3 if "16" in name else 2e-2
            np.testing.assert_allclose(got[output], array, atol=close, err_msg=name + output)


def test_logarithms_and_powers_that_onnx_lacks(tmp_path):
    """Front ends of audio and counts have `log1p`; `celu` and `logaddexp` are made of the two."""
    x = keras.Input((6,), name="x")
    scaled = layers.Rescaling(0.5)(x)
    model = keras.Model(
        x,
        {
            "log1p": ops.log1p(ops.abs(scaled)),
            "expm1": ops.expm1(scaled),
            "celu": ops.celu(scaled),
            "logaddexp": ops.logaddexp(scaled, x),
        },
    )
    data = np.random.default_rng(3).normal(size=(20, 6)).astype("float32")
    want = {
        "log1p": np.log1p(np.abs(data / 2)),
        "expm1": np.expm1(data / 2),
        "celu": np.where(data > 0, data / 2, np.expm1(data / 2)),
        "logaddexp": np.logaddexp(data / 2, data),
    }
    for name, artifact in exported(model, tmp_path, evaluation=data).items():
        assert artifact.passed, (name, artifact.reason)
        got = keras_kd.export.load(artifact.path)(data)
        for output, array in want.items():
            np.testing.assert_allclose(
                got[output], array, atol=1e-5 if "float32" in name else 1e-2, err_msg=name
            )


def test_what_cannot_convert_is_named_with_its_layer(tmp_path):
    class Spectrum(layers.Layer):
        def call(self, inputs):
            return ops.rfft(inputs)[0]

    class Bits(layers.Layer):
        def call(self, inputs):
            return ops.cast(ops.signbit(inputs), "float32")

    image = keras.Input((8, 8, 6), name="image")
    made = exported(
        keras.Model(image, Bits(name="bits")(Spectrum(name="spectrum")(image))),
        tmp_path,
        precisions="float32",
    )
    for name, operator, layer in (
        ("onnx float32", "RFFT", "spectrum"),
        ("tflite float32", "BitwiseAnd", "bits"),
    ):
        reason = made[name].reason
        assert f"no operator for TensorFlow's `{operator}` (in layer `{layer}`)" in reason or (
            f"`{operator}` (in layer `{layer}`)" in reason
        ), reason
        assert "Use another operation there" in reason
        assert not reasons._MLIR.search(reason)
    assert "allow_flex=True" in made["tflite float32"].reason


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            'x<unknown>:0: error: loc(callsite(fused["FFT:", "net_1/mix/FFT@__inf_4"] at "y")): '
            "'tf.FFT' op is neither a custom op nor a flex op",
            ["TensorFlow's `FFT` (in layer `mix`)"],
        ),
        (
            'error: loc(fused["StatefulPartitionedCall:", "StatefulPartitionedCall@__w"]): '
            'loc(fused["Einsum:", "net/head/Einsum@__inf"]): \'tfl.fully_connected\' op expects '
            "tensor<1x?xf32>",
            ["fails at `Einsum` in layer `head`", "another precision"],
        ),
    ],
)
def test_converter_errors_become_sentences(text, words):
    told = reasons.explain(RuntimeError(text), ["mix", "head"])
    assert all(word in told for word in words), told
    assert not reasons._MLIR.search(told)
    assert reasons.explain(ValueError("a sentence"), []) is None


def test_every_onnx_file_passes_the_checker(report):
    checked = 0
    for artifact in report.artifacts:
        if artifact.format == "onnx":
            onnx.checker.check_model(str(artifact.path), full_check=True)
            checked += 1
    assert checked >= 4


def test_nodes_out_of_order_are_refused_and_sorted(report):
    path = next(a.path for a in report.artifacts if (a.format, a.precision) == ("onnx", "float16"))
    model = onnx.load(path)
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    with pytest.raises(ValueError, match="not valid ONNX: Nodes in a graph must be topologically"):
        contents.check(model.SerializeToString())
    onnx_graph.sort(model)
    contents.check(model.SerializeToString())
    feed = {model.graph.input[0].name: RNG.random((3, 8, 8, 1)).astype("float32")}
    one, other = (
        onnxruntime.InferenceSession(m, providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for m in (path.read_bytes(), model.SerializeToString())
    )
    np.testing.assert_array_equal(one, other)


def test_an_invalid_file_fails_its_verification(report, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(report.folder, folder)
    content = keras_kd.export.manifest.read(folder)
    row = next(r for r in content["artifacts"] if r["file"] == "model_float16.onnx")
    model = onnx.load(folder / row["file"])
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    onnx.save(model, folder / row["file"])
    row["sha256"] = keras_kd.export.manifest.digest(folder / row["file"])
    keras_kd.export.manifest.write(content, folder / "manifest.json")
    again = keras_kd.export.verify(folder)
    assert any("not valid ONNX" in problem for problem in again.problems)


def test_sorting_knows_what_inner_graphs_read():
    from onnx import TensorProto, helper

    def branch(name, read):
        node = helper.make_node("Neg" if read == "late" else "Abs", [read], [name])
        kind = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"])
        return helper.make_graph([node], name, [], [kind])

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node(
                "If", ["c"], ["y"], then_branch=branch("t", "late"), else_branch=branch("e", "x")
            ),
            helper.make_node("Exp", ["x"], ["late"]),
        ],
        "g",
        [value("c", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, ["n"])],
        [value("y", TensorProto.FLOAT, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx_graph.sort(model)
    assert [node.op_type for node in model.graph.node] == ["Exp", "If"]
    onnx.checker.check_model(model, full_check=True)
