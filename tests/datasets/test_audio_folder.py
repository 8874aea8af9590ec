"""Recordings in folders: what is read, and what is named with its file."""

import struct
import wave

import numpy as np
import pytest

from keras_kd.datasets import audio_folder, load_task


@pytest.fixture
def recordings(tmp_path):
    def write(path, samples, rate=8000, width=2, channels=1):
        target = tmp_path / "sounds" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(target), "wb") as file:
            file.setnchannels(channels)
            file.setsampwidth(width)
            file.setframerate(rate)
            file.writeframes(samples)
        return target

    def folder(splits=(".",), count=5):
        for split in splits:
            for name in "ba":
                for i in range(count):
                    write(f"{split}/{name}/{i}.wav", np.full(4 + i, 256 * i, "<i2").tobytes())
        return tmp_path / "sounds"

    folder.write = write
    return folder


def test_folders_of_recordings_are_classes(recordings):
    root = recordings(("train", "test"))
    (root / "train" / "a" / "notes.txt").write_text("x")
    data = load_task(root)
    assert data.class_names == ("a", "b")
    assert data.sizes == {"train": 8, "validation": 2, "test": 10}
    assert data.inputs == {"kind": "audio", "sample_rate": 8000, "length": 8}
    np.testing.assert_array_equal(data.test.x[2], [2 / 128] * 6 + [0] * 2)
    assert data.test.x.dtype == np.float32
    assert any("1 files of" in note for note in data.notes)
    short = load_task(root, length=5)
    assert short.train.x.shape[1] == 5
    assert any("test: 6 recordings were cut to 5 samples" in note for note in short.notes)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_every_width(recordings, width):
    root = recordings()
    values = np.array([-1, -0.5, 0, 0.25, 0.5, 0.75])
    if width == 1:
        data = (128 + 128 * values).astype("u1").tobytes()
    else:
        whole = np.round(values * 2 ** (8 * width - 1)).astype("<i4")
        data = whole.view("u1").reshape(-1, 4)[:, :width].tobytes()
    for split in ("train", "test"):
        for name in "ab":
            for i in range(3):
                recordings.write(f"{split}/{name}/{i}.wav", data, width=width)
    np.testing.assert_array_equal(load_task(root).test.x[0], values)


def test_faults_of_recordings_name_the_file(recordings, tmp_path):
    root = recordings(("train", "test"))
    other = recordings.write("test/b/9.wav", b"\0\0" * 9, rate=16000)
    with pytest.raises(ValueError, match=r"test/b/9.wav` has 16,000 samples a second .*a/0.wav` 8"):
        load_task(root)
    recordings.write("test/b/9.wav", b"\0\0" * 8, channels=2)
    with pytest.raises(ValueError, match=r"test/b/9.wav` has 2 channels"):
        load_task(root)
    recordings.write("test/b/9.wav", b"")
    with pytest.raises(ValueError, match=r"test/b/9.wav` holds no samples"):
        load_task(root)
    other.write_bytes(b"no recording")
    with pytest.raises(ValueError, match=r"test/b/9.wav` cannot be read as a recording"):
        load_task(root)
    whole = (root / "train" / "a" / "3.wav").read_bytes()
    for size in (0, 20, len(whole) - 4):
        other.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"test/b/9.wav` (cannot be read|ends after)"):
            load_task(root)
    # IEEE floats, which the standard library does not read.
    other.write_bytes(whole[:20] + b"\3\0" + whole[22:])
    with pytest.raises(ValueError, match=r"test/b/9.wav` cannot be read as a recording"):
        load_task(root)
    other.unlink()
    recordings.write("test/c/1.wav", b"\0\0" * 4)
    with pytest.raises(ValueError, match=r"c/1.wav` is of class `c`, which is none of those"):
        load_task(root)
    (root / "train" / "d").mkdir()
    with pytest.raises(ValueError, match=r"train/d` holds no recordings"):
        load_task(root)
    with pytest.raises(ValueError, match="`image_size` does not apply to"):
        load_task(root, image_size=(2, 2))
    with pytest.raises(ValueError, match="holds the task `classification`"):
        load_task(root, "regression")


def test_a_test_folder_of_its_own_has_the_same_rate(recordings, tmp_path):
    root = recordings()
    for name in "ab":
        recordings.write(f"../other/{name}/0.wav", b"\0\0" * 4, rate=44100)
    with pytest.raises(ValueError, match=r"other/a/0.wav` has 44,100 samples a second"):
        load_task(root, test=tmp_path / "other")


def riff(tag, bits, data, extension=b"", stated=None):
    form = struct.pack("<HHIIHH", tag, 1, 8000, 1000 * bits, bits // 8, bits) + extension
    parts = b"WAVELIST\4\0\0\0infofmt " + struct.pack("<I", len(form)) + form
    stated = len(data) if stated is None else stated
    parts += b"data" + struct.pack("<I", stated) + data
    return b"RIFF" + struct.pack("<I", len(parts)) + parts


def extensible(bits, kind=1):
    guid = struct.pack("<I", kind) + bytes.fromhex("00001000800000aa00389b71")
    return struct.pack("<HHI", 22, bits, 4) + guid


def test_the_extensible_form_of_pcm(recordings):
    root = recordings()
    values = np.array([-(2**23), 2**22, 0], "<i4")
    data = values.view("u1").reshape(-1, 4)[:, :3].tobytes()
    (root / "a" / "5.wav").write_bytes(riff(0xFFFE, 24, data, extensible(24)))
    x = load_task(root, test=root).test.x
    np.testing.assert_array_equal(x[5, :4], [-1, 0.5, 0, 0])
    (root / "a" / "5.wav").write_bytes(riff(0xFFFE, 32, data * 4, extensible(32, 3)))
    with pytest.raises(ValueError, match=r"a/5\.wav` cannot be read .* as uncompressed WAV"):
        load_task(root)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (riff(1, 64, bytes(80)), "5.wav` has 64 bits a sample"),
        (riff(1, 16, bytes(80), stated=2**32 - 1), "5.wav` does not say how long it is"),
    ],
)
def test_odd_recordings(recordings, content, reason):
    root = recordings()
    (root / "b" / "5.wav").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        load_task(root)


def test_zeros_have_a_bound(recordings, monkeypatch):
    root = recordings()
    recordings.write("b/5.wav", bytes(2 * 1000))
    monkeypatch.setattr(audio_folder, "MAX_BYTES", 11 * 4 * 1000 - 1)
    with pytest.raises(ValueError, match=r"longest .* `.*b/5\.wav` with 1,000 samples.*--length N"):
        load_task(root)
    assert load_task(root, length=900).train.x.shape[1] == 900


def test_splits_and_classes_of_folders(recordings):
    root = recordings(("train", "val", "test"))
    with pytest.raises(ValueError, match=r"/val` is none of train, validation, test.*--validation"):
        load_task(root)
    data = load_task(root, validation=root / "val")
    assert data.sizes == {"train": 10, "validation": 10, "test": 10}
    assert any("left out: val" in note for note in data.notes)
    # As CIFAR-100 has it, a class is called so.
    recordings.write("x/train/1.wav", bytes(8))
    recordings.write("x/boat/1.wav", bytes(8))
    recordings.write("x/boat/deeper/1.wav", bytes(8))
    recordings.write("x/boat/2.wav", bytes(8))
    (root / "x" / "boat" / "._1.wav").write_bytes(b"of macOS")
    (root / "x" / "__MACOSX" / "boat").mkdir(parents=True)
    data = load_task(root / "x", test=root / "x", validation=root / "x")
    assert (data.class_names, len(data.train)) == (("boat", "train"), 3)
    assert any("boat/deeper" in note for note in data.notes)
    with pytest.raises(ValueError, match=r"train` holds 0 folders .* of its name: CLASS/\*\.wav"):
        load_task(root / "x", test=root / "x" / "train")
