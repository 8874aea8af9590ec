"""`tfds:` names, on real TFDS data that the tests write to disk: nothing is downloaded."""

import numpy as np
import pytest

from keras_kd import datasets

tfds = pytest.importorskip("tensorflow_datasets")
tf = pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def source():
    data = datasets.load("digits")
    images = np.round(data.x_train[:60] * 255).astype("uint8")
    return images, data.y_train[:60]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, source):
    """SPLIT/CLASS/*.png of handwritten digits."""
    root = tmp_path_factory.mktemp("folder")
    for index, (image, label) in enumerate(zip(*source, strict=True)):
        split = "test" if index % 3 == 0 else "train"
        place = root / split / f"digit_{label}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index}.png").write_bytes(tf.io.encode_png(image).numpy())
    return root


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, source):
    """The same digits as a prepared TFDS set, in TFRecords, with its own metadata."""
    root = tmp_path_factory.mktemp("prepared")
    images, labels = source
    examples = [{"image": x, "label": int(y)} for x, y in zip(images, labels, strict=True)]
    store(root, "tiny_digits", {"train": examples[:40], "test": examples[40:]})
    store(root, "train_only", {"train": examples})
    store(root, "with_validation", {"train": examples[:40], "validation": examples[40:]})
    unlabeled = [{**example, "label": -1} for example in examples[40:]]
    store(
        root,
        "unlabeled_test",
        {"train": examples[:30], "validation": examples[30:40], "test": unlabeled},
    )
    return root


def store(root, name, splits, **features):
    features = features or {
        "image": tfds.features.Image(shape=(8, 8, 1)),
        "label": tfds.features.ClassLabel(names=list("0123456789")),
    }
    builder = tfds.dataset_builders.AdhocBuilder(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={split: list(enumerate(rows)) for split, rows in splits.items()},
        data_dir=str(root),
        disable_shuffling=True,
    )
    builder.download_and_prepare()


def test_a_prepared_set_is_read_from_disk(prepared, source):
    images, labels = source
    data = datasets.load("tfds:tiny_digits", data_dir=prepared)
    assert data.name == "tfds:tiny_digits"
    assert data.class_names == tuple("0123456789")
    assert len(data.x_test) == 20
    assert sum(data.sizes.values()) == 60
    np.testing.assert_allclose(data.x_test, images[40:] / 255.0, rtol=1e-6)
    np.testing.assert_array_equal(data.y_test, labels[40:])


def test_missing_test_splits_are_carved_or_taken_from_validation(prepared, source):
    _, labels = source
    carved = datasets.load("tfds:train_only", data_dir=prepared)
    assert sum(carved.sizes.values()) == 60
    assert min(carved.sizes.values()) > 0
    taken = datasets.load("tfds:with_validation", data_dir=prepared)
    np.testing.assert_array_equal(taken.y_test, labels[40:])
    assert any("`validation` of the source is the test split" in note for note in taken.notes)


def test_a_test_split_without_labels_is_left_out(prepared, source):
    _, labels = source
    data = datasets.load("tfds:unlabeled_test", data_dir=prepared)
    np.testing.assert_array_equal(data.y_test, labels[30:40])
    assert any("has no labels and was left out" in note for note in data.notes)


def test_a_folder_of_images_needs_no_preparation(folder, source):
    data = datasets.load("tfds:image_folder", data_dir=folder)
    assert data.class_names == tuple(sorted(f"digit_{label}" for label in set(source[1].tolist())))
    assert data.input_shape == (8, 8, 3)
    assert len(data.x_test) == 20
    ink = source[0][::3].sum(dtype="float64") * 3 / 255
    assert data.x_test.sum(dtype="float64") == pytest.approx(ink, rel=1e-5)


def test_images_are_resized_on_request(folder, prepared, source):
    data = datasets.load("tfds:image_folder", data_dir=folder, image_size=(4, 6))
    assert data.input_shape == (4, 6, 3)
    half = datasets.load("tfds:tiny_digits", data_dir=prepared, image_size=(4, 4))
    assert half.input_shape == (4, 4, 1)
    # Antialiasing keeps the mean brightness.
    assert half.x_test.mean() == pytest.approx(source[0][40:].mean() / 255, rel=0.05)


def test_images_of_different_size_ask_for_a_size(tmp_path, source):
    for index, size in enumerate([(8, 8)] * 9 + [(5, 7)]):
        place = tmp_path / "train" / f"class_{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        image = tf.io.encode_png(np.full((*size, 3), 20 * index, "uint8"))
        (place / f"{index}.png").write_bytes(image.numpy())
    with pytest.raises(ValueError, match=r"differ in size: .*, first in sample \d. Pass"):
        datasets.load("tfds:image_folder", data_dir=tmp_path)
    data = datasets.load("tfds:image_folder", data_dir=tmp_path, image_size=(8, 8))
    assert data.input_shape == (8, 8, 3)


def test_a_damaged_record_is_one_clear_error(tmp_path, source):
    images, labels = source
    examples = [{"image": x, "label": int(y)} for x, y in zip(images, labels, strict=True)]
    store(tmp_path, "damaged", {"train": examples, "test": examples[:10]})
    record = next(tmp_path.glob("damaged/**/*train.tfrecord*"))
    content = bytearray(record.read_bytes())
    content[len(content) // 2] ^= 0xFF
    record.write_bytes(bytes(content))
    with pytest.raises(
        ValueError, match=r"split `train` of `tfds:damaged` cannot be read"
    ) as caught:
        datasets.load("tfds:damaged", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnst", "Did you mean `tfds:mnist`"),
        ("no_such_set_anywhere", r"`tfds.list_builders\(\)` lists the names"),
        ("mnist:0.0.1", "cannot be opened"),
        ("emnist/lettrs", "cannot be opened"),
        ("../escape", "tfds:../escape"),
        ("", "tfds:"),
        ("ag_news_subset", "is not an image classification set"),
    ],
)
def test_unknown_and_unfit_names_are_one_line(tmp_path, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        datasets.load(f"tfds:{name}", data_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_set_that_cannot_be_downloaded_says_so(tmp_path, monkeypatch):
    def offline(self, **_):
        raise OSError("Name or service not known\nsecond line")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    with pytest.raises(ValueError, match=r"could not be downloaded: Name or service") as caught:
        datasets.load("tfds:mnist", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_set_without_labels_is_refused(tmp_path, source):
    examples = [{"image": image} for image in source[0]]
    image = tfds.features.Image(shape=(8, 8, 1))
    store(tmp_path, "no_labels", {"train": examples}, image=image)
    with pytest.raises(ValueError, match=r"holds image: Image\. Choose one with"):
        datasets.load("tfds:no_labels", data_dir=tmp_path)


def test_a_set_over_the_memory_limit_is_refused_before_it_is_read(prepared, monkeypatch):
    from keras_kd.datasets import tfds as loader

    monkeypatch.setattr(loader, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"not read into memory\. Pass a smaller"):
        datasets.load("tfds:tiny_digits", data_dir=prepared)


@pytest.mark.parametrize("root", [None, "missing", "."])
def test_a_folder_that_holds_no_images(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"train/cat/1\.png"):
        datasets.load("tfds:image_folder", data_dir=root)


@pytest.mark.parametrize("size", [(0, 8), (8,)])
def test_image_size_is_two_positive_numbers(prepared, size):
    with pytest.raises(ValueError, match="height, width"):
        datasets.load("tfds:tiny_digits", data_dir=prepared, image_size=size)
