"""Where files run, told from what is in them, and files chosen for targets."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import keras
import numpy as np
import onnx
import pytest
from keras import layers

import keras_kd.export
from keras_kd.export import manifest
from keras_kd.export.formats import device_table, registry
from keras_kd.export.formats.onnx import onnx_devices
from keras_kd.export.formats.tflite import tflite_devices
from keras_kd.export.rows import ArtifactRow, Contents, FileFigures, FileRow, Measured
from keras_kd.export.verification import acceptance


def entry(report, fmt, precision):
    (found,) = [a for a in report.artifacts if (a.format, a.precision) == (fmt, precision)]
    return report.runtimes()[found.file], found


# (format, precision) to answers, as seen with files of these kinds in the runtimes themselves.
@pytest.mark.parametrize(
    ("fmt", "precision", "wanted"),
    [
        (
            *("tflite", "float32"),
            {"litert": "yes", "tflite-2.14": "yes", "tflite-micro": "slow: float"},
        ),
        ("tflite", "float32", {"ethos-u55": "no: float, nothing runs on the NPU"}),
        (
            *("tflite", "dynamic"),
            {"tflite-2.14": "no: FULLY_CONNECTED version 12, since 2.17", "litert": "yes"},
        ),
        ("tflite", "int8", {"ethos-u55": "only batch 1", "litert-js": "no: INT8 at its borders"}),
        ("tflite", "float16", {"tflite-micro": "no: DEQUANTIZE of FLOAT16", "openvino": "yes"}),
        ("onnx", "float32", {"onnxruntime-1.17": "yes", "tract": "yes", "ncnn": "only batch 1"}),
        ("onnx", "int8", {"ncnn": "no: DequantizeLinear, QuantizeLinear"}),
    ],
)
def test_answers_follow_from_what_is_in_the_file(report, fmt, precision, wanted):
    answers, _ = entry(report, fmt, precision)
    assert {name: answers[name] for name in wanted} == wanted
    # Runtimes of the other format have no say.
    assert ("tract" in answers) == (fmt == "onnx")


@pytest.mark.parametrize(
    ("made", "batch", "wanted"),
    [
        # A file of free batch has one row where there are as many as the dilation.
        ("dilated", None, "no: BATCH_TO_SPACE_ND, SPACE_TO_BATCH_ND of a free batch, computed"),
        ("dilated", 1, "slow: float"),
        ("one loop", 1, "slow: float"),
        ("two loops", 1, "no: several WHILE, computed wrongly"),
    ],
)
def test_what_microcontrollers_compute_wrongly(made, batch, wanted, tmp_path):
    """As `make runtimes` saw them: no error, and other answers than LiteRT's."""
    loops = [layers.LSTM(3, return_sequences=True), layers.GRU(3)]
    x = np.random.default_rng(0).normal(size=(4, 6, 2)).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((6, 2)),
            *([layers.Conv1D(3, 2, dilation_rate=2)] if made == "dilated" else []),
            *(loops if made == "two loops" else loops[1:] if made == "one loop" else []),
        ]
    )
    report = keras_kd.export(
        model, tmp_path / "out", "tflite", "float32", evaluation=x, batch=batch, max_drop=None
    )
    assert report.artifacts[0].passed, report.artifacts[0].reason
    (answers,) = report.runtimes().values()
    assert answers["tflite-micro"].startswith(wanted)


@pytest.mark.parametrize("free", [True, False])
def test_integer_operators_of_a_fixed_batch_in_an_old_onnx_runtime(free):
    """Version 1.17.3 answered one such file wrongly from the second call on."""
    file = SimpleNamespace(opset=17, ir=8, contributed=["QGemm", "QLinearAdd"], free=free)
    old = onnx_devices.onnxruntime(file, (1, 17))
    assert old.startswith("yes" if free else "only with enable_mem_pattern=False")
    assert onnx_devices.onnxruntime(file, (1, 20)) == "yes"
    file.contributed = ["MatMulNBits"]
    assert onnx_devices.onnxruntime(file, (1, 17)) == "yes"


@pytest.mark.parametrize(
    ("middle", "wanted"),
    [
        (lambda: layers.Conv1D(3, 2, padding="causal"), "no: Pad, not seen to run"),
        (lambda: layers.Bidirectional(layers.LSTM(2)), "no: an LSTM or GRU in both directions"),
        (lambda: layers.LSTM(2), "only batch 1"),
    ],
)
def test_what_pnnx_writes_and_ncnn_does_not_load(middle, wanted, tmp_path):
    model = keras.Sequential([keras.Input((6, 2)), middle()])
    x = np.random.default_rng(0).normal(size=(4, 6, 2)).astype("float32")
    report = keras_kd.export(
        model, tmp_path / "out", "onnx", "float32", evaluation=x, max_drop=None
    )
    (answers,) = report.runtimes().values()
    assert answers["ncnn"] == wanted


def graph_file(path, nodes, constants, shape, out):
    """An ONNX file of a few nodes from `x` to `y`."""
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {})) for node in nodes],
        "g",
        [info("x", 1, shape)],
        [info("y", 1, out)],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    onnx.save(onnx.helper.make_model(graph, ir_version=8), path)
    return registry.get("onnx").runtimes(path, (), None, ())


REPEATED = {"n": [1, 3, 1], "w": np.ones((8, 5), "float32"), "f": [1, 24]}
TO_THE_END = {"a": [0, 1], "e": [10**9, 10**9], "axes": [0, 1]}


@pytest.mark.parametrize(
    ("nodes", "constants", "batch", "wanted"),
    [
        (
            [("Tile", ["x", "n"], ["t"]), ("MatMul", ["t", "w"], ["y"])],
            REPEATED,
            1,
            "no: a product",
        ),
        ([("Expand", ["x", "n"], ["t"]), ("MatMul", ["t", "w"], ["y"])], REPEATED, 1, "no: a prod"),
        (
            [
                ("Tile", ["x", "n"], ["t"]),
                ("Reshape", ["t", "f"], ["r"]),
                ("Gemm", ["r", "w"], ["y"]),
            ],
            REPEATED,
            1,
            "no: a product of what Tile or Expand repeats, computed wrongly or refused",
        ),
        (
            [("Tile", ["x", "n"], ["t"]), ("Relu", ["t"], ["r"]), ("MatMul", ["r", "w"], ["y"])],
            REPEATED,
            1,
            "yes",
        ),
        ([("Slice", ["x", "a", "e", "axes"], ["y"])], TO_THE_END, "batch", "no: Slice to the end"),
        ([("Slice", ["x", "a", "e", "axes"], ["y"])], TO_THE_END, 1, "yes"),
        (
            [("ReverseSequence", ["x", "n"], ["y"], {"batch_axis": 1, "time_axis": 0})],
            REPEATED,
            1,
            "no: ReverseSequence",
        ),
    ],
)
def test_what_tract_refuses_or_computes_wrongly(tmp_path, nodes, constants, batch, wanted):
    answers = graph_file(tmp_path / "m.onnx", nodes, constants, [batch, 1, 8], None)
    assert answers["tract"].startswith(wanted)


def test_ncnn_computes_sums_wrongly(tmp_path):
    nodes = [("ReduceSum", ["x", "axes"], ["y"])]
    answers = graph_file(tmp_path / "m.onnx", nodes, {"axes": [1]}, [1, 3, 8], None)
    assert answers["ncnn"] == "no: ReduceSum, computed wrongly in some files"


def operator(name, **options):
    settings = SimpleNamespace(**options)
    return SimpleNamespace(
        name=name,
        first="INT8",
        outputs=("INT8",),
        option=lambda key, default=0: getattr(settings, key, default),
    )


@pytest.mark.parametrize(
    ("made", "u55", "u85"),
    [
        # Of a Bidirectional layer.
        (operator("REVERSE_V2"), "slow: REVERSE_V2 on the CPU", "yes"),
        # Of an Embedding; its report counts it as one of the CPU, and its file leaves none there.
        (operator("GATHER", axis=0, batchDims=0), "slow: GATHER on the CPU", "yes"),
        (operator("GATHER", axis=1, batchDims=1), "slow: GATHER on the CPU", "yes"),
        (operator("GATHER", axis=1), "slow: GATHER on the CPU", "slow: GATHER on the CPU"),
    ],
)
def test_what_vela_leaves_to_the_cpu(made, u55, u85):
    file = SimpleNamespace(
        types={"INT8"},
        sparse=False,
        operators=[made],
        several_rows=lambda: "",
        odd_scales=[],
        free=False,
    )
    assert tflite_devices.ethos(file, tflite_devices.ETHOS_U55) == u55
    assert tflite_devices.ethos(file, tflite_devices.ETHOS_U85) == u85


def test_what_make_runtimes_runs_is_in_the_table():
    """Its parts import what there is, and compare with entries that there are."""
    folder = Path(__file__).parents[1] / "runtimes"
    names = ("matrix", "students", "run")
    matrix, students, run = (runpy.run_path(str(folder / f"{name}.py")) for name in names)
    assert set(matrix["CLIENTS"].values()) <= set(device_table.NAMES)
    assert {label for _, _, label in run["CLIENTS"]} <= set(matrix["CLIENTS"])
    assert {"float32", "int8", "int8_qoperator", "int16x8"} <= set(students["PRECISIONS"])


def test_an_image_classifier_in_mediapipe_and_a_quantized_softmax_in_tract(images):
    assert entry(images, "tflite", "float32")[0]["mediapipe"] == "yes"
    assert entry(images, "tflite", "uint8")[0]["mediapipe"] == "yes"
    assert entry(images, "tflite", "int8")[0]["mediapipe"] == "no: INT8 input"
    softmax = entry(images, "onnx", "int8")
    nodes = onnx.load(softmax[1].path).graph.node
    after = {name: node.op_type for node in nodes for name in node.input}
    (node,) = [node for node in nodes if node.op_type == "Softmax"]
    quantized = after.get(node.output[0]) == "QuantizeLinear"
    assert softmax[0]["tract"].startswith("no: a quantized Softmax" if quantized else "yes")


def test_other_versions_of_a_family_follow_from_the_operators(report):
    _, dynamic = entry(report, "tflite", "dynamic")
    found = registry.of_file(dynamic.path).runtimes(
        dynamic.path, ["tflite-2.16", "tflite-2.17"], None, ()
    )
    assert found["tflite-2.16"].startswith("no: FULLY_CONNECTED version 12")
    assert found["tflite-2.17"].startswith("yes")
    assert registry.get("tflite").since(dynamic.path) == dynamic.details["since"] == "2.17"
    _, float32 = entry(report, "onnx", "float32")
    # Opset 17 came with ONNX Runtime 1.12.
    found = registry.of_file(float32.path).runtimes(
        float32.path, ["onnxruntime-1.11", "onnxruntime-1.12"], None, ()
    )
    assert found["onnxruntime-1.11"] == "no: operator set 17, IR 8, since 1.12"
    assert found["onnxruntime-1.12"] == "yes"


def test_the_report_shows_them_everywhere(report, tmp_path):
    where = report.runtimes()
    assert set(where) == {a.file for a in report.artifacts}
    assert all(len(line) <= 80 for line in where.table(80).splitlines())
    said = "FULLY_CONNECTED version 12, since 2.17"
    for text in (
        str(where),
        report.table(),
        report.save_html(tmp_path / "report.html").read_text(),
        report.save_card(tmp_path / "card.md").read_text().replace("\\", ""),
    ):
        assert said in text.replace("\n      ", " ")
    assert report.to_dict()["runtimes"]["model_dynamic.tflite"]["tflite-2.14"] == f"no: {said}"
    rows = where.rows()
    assert {row["runs"] for row in rows} == {True, False}
    assert all(row["runs"] != row["answer"].startswith("no") for row in rows)
    jsonschema.validate(report.manifest, manifest.schema())
    with pytest.raises(KeyError):
        where["other.tflite"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("etos-u55", "Did you mean `ethos-u55`"),
        ("tensorflow-lite", "Expected one of litert"),
        ("ONNXRuntime-web", "`onnxruntime-web`"),
        ("tflite-2", "`tflite-2.14`"),
        (7, "is no known target"),
    ],
)
def test_unknown_targets_are_refused_before_any_work(tmp_path, name, hint):
    with pytest.raises(ValueError, match="is no known target") as caught:
        keras_kd.export(None, tmp_path / "out", targets=["litert", name])
    assert hint in str(caught.value)
    assert not (tmp_path / "out").exists()


def row(file, size, answers, status="passed"):
    nothing = FileFigures(None, None, 0.0, 0.0, 100.0, True, {})
    measured = Measured(
        nothing, nothing, size, size, {}, Contents(), runtimes=answers, latency_ms=1.0
    )
    fmt = file.rpartition(".")[2]
    return ArtifactRow(fmt, "int8", status, files=(FileRow(file, "", size),), measured=measured)


def test_targets_choose_the_smallest_file_that_runs_in_all_of_them():
    rows = [
        row("a.tflite", 10, {"litert": "yes", "ethos-u55": "no: float"}),
        row("b.tflite", 20, {"litert": "yes", "ethos-u55": "slow: X on the CPU"}),
        row("c.tflite", 5, {"litert": "yes", "ethos-u55": "only batch 1"}, status="failed"),
        row("d.onnx", 8, {"tract": "yes"}),
    ]
    order = acceptance.order("size")
    best, each = device_table.chosen(rows, ["litert", "ethos-u55"], order)
    assert best == "b.tflite"
    onnx = "no: it reads no .onnx files"
    assert each["litert"] == {
        "best": "a.tflite",
        "gave_up": {"d.onnx": onnx},
    }
    assert each["ethos-u55"]["gave_up"] == {
        "d.onnx": onnx,
        "a.tflite": "no: float",
    }
    best, each = device_table.chosen(rows, ["litert", "tract"], order)
    assert best is None
    assert [each[name]["best"] for name in ("litert", "tract")] == ["a.tflite", "d.onnx"]
    best, each = device_table.chosen(rows, ["ncnn"], order)
    assert best is None
    assert each["ncnn"]["best"] is None


@pytest.fixture(scope="module")
def targeted(tmp_path_factory):
    keras.utils.set_random_seed(6)
    model = keras.Sequential(
        [keras.Input((32,), name="x"), layers.Dense(64, activation="relu"), layers.Dense(4)]
    )
    x = np.random.default_rng(1).random((64, 32)).astype("float32")
    return keras_kd.export(
        model,
        tmp_path_factory.mktemp("targets") / "out",
        formats="tflite",
        precisions=("float32", "float16", "dynamic"),
        evaluation=x,
        max_drop=None,
        targets=["tflite-2.14", "tflite-2.17"],
    )


def test_the_best_file_runs_on_the_target_and_the_report_says_what_was_given_up(targeted):
    (smallest,) = [a for a in targeted.artifacts if a.precision == "dynamic"]
    assert targeted.best.precision == "float16"
    assert smallest.bytes < targeted.best.bytes
    assert smallest.passed
    chosen = targeted.manifest["targets"]
    assert chosen["tflite-2.17"]["best"] == smallest.file
    assert list(chosen["tflite-2.14"]["gave_up"]) == [smallest.file]
    text = " ".join(targeted.table().split())
    assert "> tflite-2.14: model_float16.tflite; given up: model_dynamic.tflite (no: FULLY" in text
    assert targeted.runtimes()[smallest.file]["tflite-2.17"].startswith("yes")
    jsonschema.validate(targeted.manifest, manifest.schema())
    assert keras_kd.export.verify(targeted.folder).ok


@pytest.mark.parametrize(
    ("sizes", "block", "relu", "wrong"),
    [
        ((16, 4, 4), 32, False, True),
        ((16, 4, 4), 64, False, False),
        ((16, 5, 5), 32, False, False),
        ((16, 4, 4), 32, True, False),
    ],
)
def test_4_bit_blocks_that_tract_misreads(tmp_path, sizes, block, relu, wrong):
    node, rows = onnx.helper.make_node, int(np.prod(sizes))
    nodes = [
        node("MaxPool", ["x"], ["m"], kernel_shape=[1, 1]),
        node("Transpose", ["m"], ["t"], perm=[0, 2, 3, 1]),
        node("Reshape", ["t", "shape"], ["r"]),
        *([node("Relu", ["r"], ["p"])] if relu else []),
        node("MatMulNBits", ["p" if relu else "r", "w", "s"], ["y"], domain="com.microsoft"),
    ]
    for name, value in {"K": rows, "N": 2, "bits": 4, "block_size": block}.items():
        nodes[-1].attribute.append(onnx.helper.make_attribute(name, value))
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "g", [info("x", 1, [1, *sizes])], [info("y", 1, [1, 2])], []
    )
    onnx.save(onnx.helper.make_model(graph, ir_version=8), tmp_path / "m.onnx")
    answer = registry.get("onnx").runtimes(tmp_path / "m.onnx", (), None, ())["tract"]
    assert answer.startswith("no: MatMulNBits") == wrong


def test_every_runtime_is_documented_by_how_it_was_tried():
    for name, runtime in device_table.RUNTIMES.items():
        assert runtime.name == name
        assert runtime.formats
        assert runtime.tried
        assert device_table.find(name) is runtime
    assert device_table.find("tflite-x") is None


def test_the_first_runtime_of_an_operator_set_grows_with_it():
    opsets = [version for _, version in onnx_devices._OPSETS]
    assert opsets == sorted(opsets)
