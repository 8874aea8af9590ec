"""`.npz` files: what is read, and what is refused without being run."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from keras_kd import datasets
from keras_kd.datasets import files


def arrays(samples=24, **more):
    generator = np.random.default_rng(3)
    images = generator.integers(0, 256, (samples, 6, 5), dtype=np.uint8)
    labels = np.arange(samples, dtype=np.int64) % 3
    splits = {"x_train": images, "y_train": labels, "x_test": images[:9], "y_test": labels[:9]}
    return {**splits, **more}


def test_a_file_is_loaded_scaled_and_split(tmp_path):
    path = tmp_path / "tiny.npz"
    content = arrays()
    np.savez_compressed(path, **content)
    data = datasets.load(path)
    assert data.name == str(path)
    assert data.sizes == {"train": 21, "validation": 3, "test": 9}
    np.testing.assert_allclose(data.x_test[..., 0], content["x_test"] / 255.0, rtol=1e-6)
    assert [note.split(":")[0].split(" ")[0] for note in data.notes] == ["The", "The", "Integer"]


def test_validation_and_class_names_are_taken_from_the_file(tmp_path):
    path = tmp_path / "tiny.npz"
    content = arrays()
    content |= {"x_validation": content["x_train"][:6], "y_validation": content["y_train"][:6]}
    np.savez(path, class_names=np.array(["cat", "dog", "cow"]), **content)
    data = files.load(path)
    assert data.sizes == {"train": 24, "validation": 6, "test": 9}
    assert data.class_names == ("cat", "dog", "cow")


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_pickled_arrays_are_refused_and_never_run(tmp_path):
    path, folder = tmp_path / "bomb.npz", tmp_path / "made-by-the-bomb"
    bomb = np.array([Bomb(str(folder))], dtype=object)
    np.savez(path, **arrays(x_train=bomb))
    with pytest.raises(ValueError, match=r"`x_train` in .* is a pickled object array"):
        files.load(path)
    bare = tmp_path / "bare.npz"
    bare.write_bytes(pickle.dumps(Bomb(str(folder))))
    with pytest.raises(ValueError, match="truncated or of another format"):
        files.load(bare)
    assert not folder.exists()


def truncate(path):
    np.savez(path, **arrays())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path):
    np.savez_compressed(path, **arrays())
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF
    path.write_bytes(bytes(content))


def claim_too_much(path):
    with zipfile.ZipFile(path, "w") as archive:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1024), }"
        header = header.ljust(118) + b"\n"
        content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", content)


@pytest.mark.parametrize(
    "spoil",
    [
        truncate,
        flip,
        claim_too_much,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("x_train, y_train\n"),
        lambda path: np.save(path.open("wb"), np.zeros(3)),
    ],
    ids=["truncated", "flipped byte", "absurd header", "empty", "text", "npy"],
)
def test_damaged_and_foreign_files_are_one_clear_error(tmp_path, spoil):
    path = tmp_path / "spoiled.npz"
    spoil(path)
    with pytest.raises(ValueError, match=r"spoiled.npz` is not a readable `.npz` file") as caught:
        files.load(path)
    assert "\n" not in str(caught.value)


def test_a_foreign_zip_is_told_from_arrays(tmp_path):
    path = tmp_path / "other.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train", "no array")
        for name in ("y_train", "x_test", "y_test"):
            archive.writestr(name, "no array")
    with pytest.raises(ValueError, match="is not an array but a file of another kind"):
        files.load(path)


@pytest.mark.parametrize("name", ["missing.npz", "."])
def test_missing_files_and_folders(tmp_path, name):
    with pytest.raises(ValueError, match=r"does not exist|is a folder"):
        files.load(tmp_path / name)


def test_missing_arrays_are_listed_with_a_guess(tmp_path):
    path = tmp_path / "tiny.npz"
    content = arrays()
    content["X_train"] = content.pop("x_train")
    np.savez(path, **content)
    with pytest.raises(ValueError, match=r"lacks `x_train`: .* Did you mean `X_train`\?"):
        files.load(path)


def test_half_a_validation_split_is_refused(tmp_path):
    path = tmp_path / "tiny.npz"
    np.savez(path, **arrays(x_validation=np.zeros((3, 6, 5), "uint8")))
    with pytest.raises(ValueError, match="only one of `x_validation` and `y_validation`"):
        files.load(path)


def test_wrong_lengths_and_nan_name_the_file(tmp_path):
    path = tmp_path / "tiny.npz"
    np.savez(path, **arrays(y_test=np.zeros(4, "int64")))
    with pytest.raises(ValueError, match=r"tiny.npz` has 9 samples and `y_test` has 4"):
        files.load(path)
    images = np.zeros((24, 6, 5), "float32")
    images[11, 2, 2] = np.inf
    np.savez(path, **arrays(x_train=images, x_test=images[:9]))
    with pytest.raises(ValueError, match="first in sample 11"):
        files.load(path)
