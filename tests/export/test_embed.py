"""What the files say about themselves, read back by other means than it was written with."""

import io
import json
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.tools import flatbuffer_utils
from flatbuffers import encode, number_types, table

import keras_kd.export
from keras_kd.export.formats import metadata as embed
from keras_kd.export.formats.tflite import uint8_io
from keras_kd.export.signature import Signature, TensorInfo
from keras_kd.export.verification.keras_answers import (
    check_class_names,
    read_normalization,
)

TFLITE = ("float32", "int8", "uint8")


class Table:
    """A FlatBuffers table read by the numbers of its fields in `metadata_schema.fbs`."""

    def __init__(self, buffer, position):
        self._table = table.Table(buffer, position)

    @classmethod
    def root(cls, buffer):
        return cls(buffer, encode.Get(number_types.UOffsetTFlags.packer_type, buffer, 0))

    def _at(self, field):
        return self._table.Offset(4 + 2 * field)

    def text(self, field):
        at = self._at(field)
        return self._table.String(at + self._table.Pos).decode() if at else None

    def number(self, field, flags):
        at = self._at(field)
        return self._table.Get(flags, at + self._table.Pos) if at else 0

    def child(self, field):
        at = self._at(field)
        if not at:
            return None
        return Table(self._table.Bytes, self._table.Indirect(at + self._table.Pos))

    def children(self, field):
        at = self._at(field)
        if not at:
            return []
        start = self._table.Vector(at)
        return [
            Table(self._table.Bytes, self._table.Indirect(start + 4 * i))
            for i in range(self._table.VectorLen(at))
        ]

    def floats(self, field):
        at = self._at(field)
        return self._table.GetVectorAsNumpy(number_types.Float32Flags, at).tolist()


def metadata(blob):
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(blob))
    (entry,) = [entry for entry in model.metadata if entry.name == b"TFLITE_METADATA"]
    buffer = bytes(model.buffers[entry.buffer].data)
    assert buffer[4:8] == b"M001"
    return Table.root(buffer)


def artifact(report, name):
    return next(a for a in report.artifacts if f"{a.format} {a.precision}" == name)


@pytest.mark.parametrize("precision", TFLITE)
def test_tflite_metadata_says_names_normalization_ranges_and_labels(images, colored, precision):
    path = artifact(images, f"tflite {precision}").path
    root = metadata(path.read_bytes())
    assert root.text(0) == "colors"
    assert root.text(1).startswith(f"{precision}, exported by keras-kd ")
    assert root.text(7) == "1.0.0"
    (graph,) = root.children(3)
    (image,), (color,) = graph.children(2), graph.children(3)
    assert (image.text(0), color.text(0)) == ("image", "color")
    content = image.child(3)
    assert content.number(0, number_types.Uint8Flags) == 2  # ImageProperties
    assert content.child(1).number(0, number_types.Int8Flags) == 1  # RGB
    (unit,) = image.children(4)
    assert unit.number(0, number_types.Uint8Flags) == 1  # NormalizationOptions
    assert unit.child(1).floats(0) == [0.0]
    assert unit.child(1).floats(1) == [255.0]
    pixels = colored[0]
    stats = image.child(5)
    np.testing.assert_allclose(stats.floats(0), [pixels.max() / 255], rtol=1e-6)
    np.testing.assert_allclose(stats.floats(1), [pixels.min() / 255], rtol=1e-6)
    (labels,) = color.children(6)
    assert labels.text(0) == "labels.txt"
    assert labels.number(2, number_types.Int8Flags) == 2  # TENSOR_AXIS_LABELS
    with zipfile.ZipFile(path) as archive:
        (entry,) = archive.infolist()
        assert (entry.filename, entry.compress_type) == ("labels.txt", zipfile.ZIP_STORED)
        assert entry.date_time == (1980, 1, 1, 0, 0, 0)
        assert archive.read(entry) == b"red\ngreen\nbluish\n"


def test_files_with_metadata_run_and_are_proven(images, tmp_path):
    assert [a.status for a in images.artifacts] == ["passed"] * 5
    assert keras_kd.export.verify(images.folder).ok
    assert images.manifest["model"]["normalization"] == {"image": {"mean": [0.0], "std": [255.0]}}
    card = images.save_card(tmp_path / "card.md").read_text()
    assert "`image` is an image: (pixel - mean) / std of pixels 0..255, with mean 0 and std" in card


def test_a_uint8_file_takes_pixels_as_they_are(images, colored):
    pixels, y = colored
    answers = {}
    for precision in ("int8", "uint8"):
        interpreter = Interpreter(str(artifact(images, f"tflite {precision}").path))
        interpreter.allocate_tensors()
        (before,), (after,) = interpreter.get_input_details(), interpreter.get_output_details()
        assert before["dtype"] == after["dtype"] == np.dtype(precision)
        assert (before["name"], after["name"]) == ("image", "color")
        scale, zero = before["quantization"]
        if precision == "uint8":
            assert (scale, zero) == (pytest.approx(1 / 255), 0)
        else:
            # From the calibration data, whose brightest pixel is 219.
            assert scale == pytest.approx(pixels.max() / 255 / 255, rel=0.02)
        rows = []
        for image in pixels:
            x = image if precision == "uint8" else np.round(image / 255 / scale) + zero
            interpreter.set_tensor(before["index"], x[None].astype(before["dtype"]))
            interpreter.invoke()
            rows.append(interpreter.get_tensor(after["index"])[0].astype(int))
        answers[precision] = np.stack(rows)
        scale, zero = after["quantization"]
        assert (scale, zero) == (1 / 256, 0 if precision == "uint8" else -128)
    assert np.mean(answers["uint8"].argmax(1) == y) == 1
    # Pixels are rounded twice on the way in: one step at the logits, a few after softmax.
    assert np.abs(answers["uint8"] - 128 - answers["int8"]).max() <= 4


def test_snippets_know_unsigned_bytes(images):
    code = images.snippets(artifact(images, "tflite uint8"))
    assert "coerceIn(0, 255)" in code["kotlin"]
    assert "and 0xFF" in code["kotlin"]
    assert "UInt8(max(0, min(255, " in code["swift"]
    assert "0.f, 255.f" in code["cpp"]
    assert "new Uint8Array(192)" in code["javascript"]
    assert "np.iinfo(np.uint8)" in code["python"]
    signed = images.snippets(artifact(images, "tflite int8"))
    assert "coerceIn(-128, 127)" in signed["kotlin"]


def test_onnx_files_hold_the_same_as_json(images, colored):
    for precision in ("float32", "int8"):
        path = artifact(images, f"onnx {precision}").path
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        texts = session.get_modelmeta().custom_metadata_map
        values = {key: json.loads(text) for key, text in texts.items()}
        assert values["labels"] == ["red", "green", "bluish"]
        assert values["normalization"] == {"image": {"mean": [0.0], "std": [255.0]}}
        facts = values["manifest"]
        assert (facts["model"], facts["precision"]) == ("colors", precision)
        assert facts["inputs"] == images.manifest["model"]["inputs"]
        assert facts["ranges"]["image"] == pytest.approx([0.0, colored[0].max() / 255])
        assert facts["versions"]["keras"] == images.manifest["versions"]["keras"]
        if precision == "float32":
            assert set(values) == {"labels", "normalization", "manifest"}
            continue
        scales = values["quantization"]["image"]
        assert scales["dtype"] in ("int8", "uint8")
        steps = colored[0].max() / 255 / scales["scale"]
        # The whole range of values lies on the 256 steps.
        assert 250 < steps < 256.5


def test_without_normalization_an_input_is_no_image(report):
    root = metadata(artifact(report, "tflite int8").path.read_bytes())
    (graph,) = root.children(3)
    (image,) = graph.children(2)
    assert image.text(0) == "image"
    assert image.child(3) is None
    assert image.children(4) == []
    model = onnx.load(artifact(report, "onnx float32").path)
    assert {entry.key for entry in model.metadata_props} == {"manifest", "labels"}
    assert report.manifest["model"]["normalization"] == {}


ABOUT = {
    "name": "m",
    "signature": Signature(
        "single",
        (TensorInfo("image", (None, 8, 8, 3), "float32"),),
        (TensorInfo("color", (None, 1), "float32"),),
    ).to_dict(),
    "labels": ["no", "yes"],
    "normalization": {},
    "ranges": {},
    "versions": {"keras": "3"},
}


def test_the_same_input_gives_the_same_bytes(images):
    blob = artifact(images, "tflite float32").path.read_bytes()
    once = embed.tflite(blob, ABOUT, "float32")
    assert once == embed.tflite(blob, ABOUT, "float32")
    again = artifact(images, "onnx float32").path.read_bytes()
    assert embed.onnx(again, ABOUT, "x") == embed.onnx(again, ABOUT, "x")


def test_two_names_for_one_number_are_names_of_its_values(images):
    path = artifact(images, "tflite float32").path
    model = flatbuffer_utils.read_model(path)
    model.metadata = []
    blob = bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    blob = embed.tflite(blob, ABOUT, "float32")
    (labels,) = metadata(blob).children(3)[0].children(3)[0].children(6)
    assert labels.number(2, number_types.Int8Flags) == 3  # TENSOR_VALUE_LABELS
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        assert archive.read("labels.txt") == b"no\nyes\n"
    without = embed.tflite(blob, {**ABOUT, "labels": None}, "float32")
    assert not zipfile.is_zipfile(io.BytesIO(without))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ({"mean": [1.0, 2.0, 3.0], "std": [1.0] * 3}, "normalized differently in each channel"),
        ({"mean": [-3.0], "std": [1.0]}, "no pixel value"),
    ],
)
def test_uint8_is_refused_where_one_scale_cannot_say_it(images, pixels, message):
    blob = artifact(images, "tflite int8").path.read_bytes()
    with pytest.raises(ValueError, match=message):
        uint8_io.unsigned(blob, {"image": pixels})


SIGNATURE = Signature(
    "dict",
    (
        TensorInfo("left", (None, 8, 8, 3), "float32"),
        TensorInfo("right", (None, 8, 8, 1), "float32"),
        TensorInfo("age", (None, 1), "float32"),
    ),
    (),
)


def test_normalization_is_read_as_number_channel_or_dict():
    one = Signature("single", SIGNATURE.inputs[:1], ())
    assert read_normalization(None, one) == {}
    assert read_normalization((127.5, 127.5), one) == {"left": {"mean": [127.5], "std": [127.5]}}
    assert read_normalization(([1, 2, 3], 4), one) == {
        "left": {"mean": [1.0, 2.0, 3.0], "std": [4.0, 4.0, 4.0]}
    }
    assert list(read_normalization({"right": (0, 255)}, SIGNATURE)) == ["right"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((0, 255), r"has 2: \['left', 'right'\]. Pass a dict"),
        ({"age": (0, 1)}, "`age` in `normalization` is no image input"),
        ({"left": (0, 0)}, "std above 0"),
        ({"left": ([1, 2], 1)}, "each a number or 3 of them"),
        ({"left": (float("nan"), 1)}, "each a number or 3"),
        ({"left": 255}, "must be `\\(mean, std\\)`"),
        ({"left": ("a", "b")}, "must be `\\(mean, std\\)`"),
    ],
)
def test_unusable_normalization_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        read_normalization(value, SIGNATURE)


def test_class_names_are_single_lines():
    class Answers:
        outputs = {"kind": np.zeros((1, 2))}  # noqa: RUF012
        kinds = {"kind": {"kind": "classes"}}  # noqa: RUF012

    with pytest.raises(ValueError, match="must be one line"):
        check_class_names(["a", "b\nc"], Answers)
