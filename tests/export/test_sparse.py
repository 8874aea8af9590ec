"""Weights without zeros: smaller files, the same answers, whoever made the file."""

from dataclasses import replace

import jsonschema
import judging
import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_litert.tools import flatbuffer_utils
from keras import layers

import keras_kd.export
from keras_kd import compress
from keras_kd.export import exporter, manifest
from keras_kd.export.formats.tflite import sparsity
from keras_kd.export.rows import Against, Contents, Failure, FileFigures, Measured
from keras_kd.export.verification import acceptance

DTYPES = {0: np.float32, 1: np.float16, 9: np.int8}


def opened(blob):
    return flatbuffer_utils.read_model_from_bytearray(bytearray(blob))


def operators(model):
    return [
        flatbuffer_utils.opcode_to_name(model, op.opcodeIndex)
        for op in model.subgraphs[0].operators
    ]


def pruned_file(blob, share, block=1):
    """The file with the smallest weights of each big constant set to zero, in whole blocks."""
    model = opened(blob)
    for tensor in model.subgraphs[0].tensors:
        data = model.buffers[tensor.buffer].data
        if data is None or tensor.type not in DTYPES or len(tensor.shape) < 2:
            continue
        values = np.frombuffer(bytes(data), DTYPES[tensor.type]).copy()
        if values.size > 200:
            size = np.abs(values.astype("float32")).reshape(-1, block).sum(axis=1)
            small = size <= np.sort(size)[int(share * len(size)) - 1]
            values.reshape(-1, block)[small] = 0
            model.buffers[tensor.buffer].data = np.frombuffer(values.tobytes(), np.uint8)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def unpacked(model, tensor):
    """A sparse tensor written out, following the definition of the format, entry by entry."""
    parameters = tensor.sparsity
    stored = np.frombuffer(bytes(model.buffers[tensor.buffer].data), DTYPES[tensor.type])
    rank = len(tensor.shape)
    run = (
        parameters.dimMetadata[-1].denseSize
        if parameters.blockMap is not None and len(parameters.blockMap)
        else 1
    )
    order = list(parameters.traversalOrder)[:rank]
    rows = parameters.dimMetadata[rank - 1]
    assert [d.denseSize for d in parameters.dimMetadata[: rank - 1]] == [
        tensor.shape[a] for a in order[:-1]
    ]
    begins, places = rows.arraySegments.values, rows.arrayIndices.values
    whole = np.zeros([tensor.shape[axis] for axis in order], stored.dtype)
    for row, index in enumerate(np.ndindex(*whole.shape[:-1])):
        for entry in range(begins[row], begins[row + 1]):
            start = int(places[entry]) * run
            whole[index][start : start + run] = stored[entry * run : (entry + 1) * run]
    return np.transpose(whole, np.argsort(order))


def answers(blob, x, delegates):
    kernels = OpResolverType.AUTO if delegates else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    runner = Interpreter(
        model_content=blob, experimental_op_resolver_type=kernels
    ).get_signature_runner()
    ((name, row),) = runner.get_input_details().items()
    scale, zero = row["quantization"]
    if row["dtype"] == np.int8:
        x = np.clip(np.round(x / scale) + zero, -128, 127)
    return runner(**{name: x.astype(row["dtype"])})["logits"]


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_the_file_is_smaller_and_answers_bit_for_bit(report, blobs, precision, block):
    path = next(
        a.path for a in report.artifacts if (a.format, a.precision) == ("tflite", precision)
    )
    whole = pruned_file(path.read_bytes(), 0.8, block)
    smaller, facts = sparsity.encode(whole)
    assert facts["sparsity"] == pytest.approx(0.8, abs=0.02)
    assert facts["tensors"] >= 2
    # Of four values and one index byte, of two and one, of one and one, a fifth is left.
    bound = {"float32": 0.35, "float16": 0.5, "int8": 0.75}[precision]
    assert len(smaller) < bound * len(whole)
    for delegates in (True, False):
        want, got = (answers(blob, blobs[0][:8], delegates) for blob in (whole, smaller))
        np.testing.assert_array_equal(got, want)
    before, after = opened(whole), opened(smaller)
    kept = {tensor.name: tensor for tensor in before.subgraphs[0].tensors}
    found = [tensor for tensor in after.subgraphs[0].tensors if tensor.sparsity is not None]
    assert len(found) == facts["tensors"] == operators(after).count("DENSIFY")
    for tensor in found:
        old = kept[tensor.name.removesuffix(b"_sparse")]
        data = np.frombuffer(bytes(before.buffers[old.buffer].data), DTYPES[old.type])
        np.testing.assert_array_equal(unpacked(after, tensor).ravel(), data)
    if precision == "int8":
        # LiteRT refuses int8 products behind a DENSIFY; the small last layer may stay as it is.
        assert operators(after).count("CONV_2D") > operators(before).count("CONV_2D")


def test_int8_weights_that_multiply_floats_keep_their_zeros(report):
    path = next(
        a.path for a in report.artifacts if (a.format, a.precision) == ("tflite", "dynamic")
    )
    smaller, facts = sparsity.encode(pruned_file(path.read_bytes(), 0.8))
    assert smaller is None
    assert facts["refused"] > 3000


def test_files_of_models_that_are_not_pruned_stay_as_they_are(report):
    for artifact in report.artifacts:
        assert artifact.sparsity is None
        assert "dense" not in artifact.details
        if artifact.format == "tflite":
            assert sparsity.encode(artifact.path.read_bytes())[0] is None
            assert "DENSIFY" not in artifact.details["contents"]["operators"]


def test_indices_take_the_fewest_bytes_and_runs_where_zeros_are_blocks():
    rng = np.random.default_rng(0)
    scattered = (rng.random((300, 64)) > 0.8).astype("int8")
    # 64 places fit into a byte, 300 do not.
    assert sparsity.smallest(scattered).axis == 1
    blocks = np.repeat((rng.random((64, 16)) > 0.8).astype("int8"), 4, axis=1)
    layout = sparsity.smallest(blocks)
    assert (layout.axis, layout.run) == (1, 4)
    kept = int(blocks.sum())
    assert layout.bytes == kept + kept // 4 + (64 + 1) * (1 if kept // 4 < 256 else 2)


NOTHING = FileFigures(None, None, 0.0, 0.0, 100.0, True, {})
PLAIN = Measured(NOTHING, NOTHING, 9, 9, {}, Contents(), latency_low_ms=1.0)
FOUND = replace(PLAIN, latency_low_ms=2.0, against=Against(0.0))


@pytest.mark.parametrize(
    ("found", "objective", "reason"),
    [
        (FOUND, "size", ""),
        (FOUND, "latency", "2.0 times slower"),
        (Failure("the process crashed (signal 11, SIGSEGV)"), "size", "SIGSEGV"),
        (replace(FOUND, against=Against(0.01)), "size", "answer differently"),
        (replace(FOUND, against=Against(float("nan"))), "size", "answer differently"),
    ],
)
def test_a_smaller_file_must_run_and_answer_the_same(found, objective, reason):
    got = acceptance.refusal(PLAIN, found, objective)
    assert reason in got
    assert bool(got) == bool(reason)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The report of a pruned and quantization-aware model, whose sparse float32 file crashes."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((256,), name="x"),
            layers.Dense(64, activation="relu", name="hidden"),
            layers.Dense(4, name="y"),
        ]
    )
    x = np.random.default_rng(2).random((40, 256)).astype("float32")
    aware = compress.quantize_aware(compress.prune(model, sparsity=0.9), calibration=x)
    measure = exporter.jobs.measure

    def broken(*arguments):
        found = measure(*arguments)
        failed = {"tflite-float32-sparse": Failure("it crashed")}
        return replace(found, files={**found.files, **failed})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter.jobs, "measure", broken)
        return keras_kd.export(
            aware,
            tmp_path_factory.mktemp("sparse") / "out",
            formats="tflite",
            precisions=("float32", "int8"),
            evaluation=x,
            max_drop=None,
            sparse=True,
        )


def test_a_pruned_int8_model_gives_a_smaller_file(exported):
    full, small = exported.artifacts
    assert small.passed, small.reason
    assert exported.best is small
    assert small.sparsity == pytest.approx(0.9, abs=0.01)
    details = small.details
    assert small.bytes == small.path.stat().st_size < 0.6 * details["dense"]["bytes"]
    assert details["dense"]["gzip_bytes"] < details["dense"]["bytes"]
    assert details["contents"]["operators"]["DENSIFY"] >= 1
    assert details["contents"]["float_operators"] == []
    # What is trained is what the file computes.
    assert details["metrics"]["worst"] <= 2.001 * details["signature"]["outputs"][0]["scale"]
    for text in (exported.table(), exported.save_card(exported.folder / "card.md").read_text()):
        assert "% of its weights are zeros and not stored" in text
    # What a crash leaves is the file as it was, and the reason.
    assert full.passed
    assert full.sparsity is None
    assert full.bytes == full.path.stat().st_size > 4 * 256 * 64
    assert "it crashed" in " ".join(full.details["notes"])
    assert [p.name for p in exported.folder.iterdir() if p.name.startswith(".")] == []
    jsonschema.validate(exported.manifest, manifest.schema())
    assert keras_kd.export.verify(exported.folder).ok


def test_a_file_slower_than_with_its_zeros_is_flagged(exported):
    row = dict(exported.artifacts[1].details)
    quick = {**row["dense"], "slowdown": 1.0, "latency_low_ms": row["latency_low_ms"]}
    for dense, flag in (
        (quick, None),
        ({**quick, "latency_low_ms": row["latency_low_ms"] / 2}, "2.0 times slower than with its"),
        ({**quick, "slowdown": 3.0}, "3.0 times slower than with its zeros stored where XNNPACK"),
    ):
        row["dense"] = dense
        judging.judge([row], None, True)
        assert any(flag in text for text in row["flags"]) if flag else row["flags"] == []
