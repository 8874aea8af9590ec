"""Rows of any task: CSV, CoNLL, folders of images and arrays, and what is wrong with them."""

import gzip

import numpy as np
import pytest
from PIL import Image

from keras_kd.datasets import load_task

TABLE = "age,job,city,income\n39,clerk,Bern,low\n50,cook,Bonn,high\n28,clerk,Bonn,low\n"


@pytest.fixture
def table(tmp_path):
    def write(text, name="data.csv"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def rows(count=40):
    """A table of two classes with a number, a category and a code."""
    lines = [f"{i}.5,{'ab'[i % 2]},{1000 + i % 3},{'yes' if i % 4 else 'no'}" for i in range(count)]
    return "\n".join(["x,kind,code,label", *lines]) + "\n"


def test_a_table_becomes_numbers_in_the_order_of_its_columns(table):
    data = load_task(
        table(rows()), target="label", categories=["code"], test=table(rows(8), "test.csv")
    )
    assert data.inputs["columns"] == [
        {"name": "x", "mean": 0.0, "std": 1.0},
        {"name": "kind", "values": ["a", "b"]},
        {"name": "code", "values": ["1000", "1001", "1002"]},
    ]
    # Row 5 of the file: 5.5, b, 1002, yes.
    np.testing.assert_array_equal(data.test.x[5], [5.5, 0, 1, 0, 0, 1])
    assert (data.class_names, data.test.y[5], data.test.y[4]) == (("no", "yes"), 1, 0)
    assert data.sizes == {"train": 36, "validation": 4, "test": 8}
    # The rows that were taken for validation are known by their place in the file.
    np.testing.assert_array_equal(
        np.sort(np.concatenate([data.train.index, data.validation.index])), np.arange(40)
    )
    again = load_task(table(rows()), target="label", categories=["code"])
    np.testing.assert_array_equal(again.train.x[:, 0] - 0.5, again.train.index)


def test_standardized_columns_have_the_mean_of_the_training_file(table):
    data = load_task(
        table(rows()), target="label", standardize=True, test=table(rows(8), "test.csv")
    )
    values = np.arange(40) + 0.5
    expected = (np.arange(8) + 0.5 - values.mean()) / values.std()
    np.testing.assert_allclose(data.test.x[:, 0], expected, rtol=1e-5)


def test_gzip_semicolons_quotes_and_byte_order_marks(tmp_path):
    text = '\ufeffx;"text";y\r\n1;"a;\r\nb";0\r\n2;"c";1\r\n3;"a;\r\nb";1\r\n4;c;0\r\n' * 1
    text += "".join(f"{i};c;{i % 2}\r\n" for i in range(5, 15))
    path = tmp_path / "data.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    data = load_task(path, target="y", test=path)
    assert data.inputs["columns"][1]["values"] == ["a;\r\nb", "c"]
    assert data.class_names == ("0", "1")


def test_tabs_are_not_quoted(table):
    text = "text\ty\n" + "".join(f'"word{i % 2} said\t{i % 2}\n' for i in range(20))
    data = load_task(table(text, "data.tsv"), target="y", text="text")
    assert sum(data.sizes.values()) == 20


def test_texts_stay_with_their_rows_through_splits(table):
    text = "text,y\n" + "".join(f'"Word{i % 7}, it said.",{i % 2}\n' for i in range(40))
    data = load_task(table(text), target="y", text="text")
    for rows in (data.train, data.validation, data.test):
        assert len(rows.texts) == len(rows)
        assert rows.texts == tuple(f"Word{i % 7}, it said." for i in rows.index)
    data = load_task(table(SENTENCE * 10, "a.conll"), "tokens", test=table(SENTENCE, "b.bio"))
    assert data.test.texts == (("Ada", "Lovelace", "wrote"), ("In", "Bern"))
    for rows in (data.train, data.validation):
        assert [len(tokens) for tokens in rows.texts] == (rows.y >= 0).sum(axis=1).tolist()
    assert load_task("digits").train.texts == ()


@pytest.mark.parametrize(
    ("labels", "names", "first"),
    [
        (["3", "0", "1"], ("0", "1", "2", "3"), 3),
        (["5", "3", "4"], ("3", "4", "5"), 2),
        (["1.0", "0.0", "1.0"], ("0", "1"), 1),
        (["b", "a", "10"], ("10", "a", "b"), 2),
        (["100000", "0", "7"], ("0", "7", "100000"), 2),
    ],
)
def test_class_numbers(table, labels, names, first):
    text = "x,y\n" + "".join(f"{i},{labels[i % 3]}\n" for i in range(30))
    data = load_task(table(text), target="y")
    assert data.class_names == names
    place = list(data.train.index).index(3) if 3 in data.train.index else None
    assert place is None or data.train.y[place] == first


def test_other_tasks_of_a_table(table):
    text = "x,a,b\n" + "".join(f"{i},{i % 2},{i / 8}\n" for i in range(30))
    regression = load_task(table(text), "regression", target=["b"])
    assert (regression.units, regression.train.x.shape[1]) == (1, 2)
    np.testing.assert_allclose(regression.train.y[:, 0], regression.train.index / 8)
    ranking = load_task(table(text), "ranking", target=["a", "b"])
    assert (ranking.units, ranking.class_names) == (2, ("a", "b"))
    with pytest.raises(ValueError, match=r"line 3 has the label 0.125, but class numbers and yes"):
        load_task(table(text), "multilabel", target=["a", "b"])


def test_rows_without_a_label_stay_in_training(table):
    text = "x,y\n" + "".join(f"{i},{'' if i % 5 else 'ab'[i % 2]}\n" for i in range(100))
    data = load_task(table(text), target="y", unlabeled=True)
    assert data.labeled.sum() + len(data.test) + len(data.validation) == 20
    assert (data.test.y >= 0).all()
    assert (data.validation.y >= 0).all()
    assert "have no label and learn from the teacher alone" in data.notes[-1]
    with pytest.raises(ValueError, match=r"line 3: the target `y` is missing.*--unlabeled"):
        load_task(table(text), target="y")
    with pytest.raises(ValueError, match="`classification` alone"):
        load_task(table(text), "regression", target="y", unlabeled=True)


def test_texts_become_numbers_of_words(table):
    text = "text,y\n" + "".join(f'"The cat, THE dog {i}!",{i % 2}\n' for i in range(20))
    data = load_task(table(text), target="y", text="text", length=5)
    assert data.inputs["vocabulary"] == ["", "[UNK]", "the", "cat", "dog"]
    np.testing.assert_array_equal(data.train.x[0], [2, 3, 2, 4, 1])
    own = table("\n[UNK]\ndog\nthe\n", "words.txt")
    again = load_task(table(text), target="y", text="text", length=6, vocabulary=own)
    np.testing.assert_array_equal(again.train.x[0], [3, 1, 3, 2, 1, 0])


def test_words_are_split_as_keras_does(table):
    import keras

    texts = ["It's a TEST-case, isn't it?", "  two  spaces\tand tab ", "Größe 3.5 €", "a_b (c) [d]"]
    layer = keras.layers.TextVectorization()
    layer.adapt(texts)
    from keras_kd.datasets import vocabulary

    words = [vocabulary.words(text) for text in texts]
    known = layer.get_vocabulary()
    ids, _, unknown = vocabulary.encode(words, known, max(map(len, words)))
    assert unknown == 0
    np.testing.assert_array_equal(ids, keras.ops.convert_to_numpy(layer(texts)))


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        (TABLE, {}, "No target is named.*--target COLUMN"),
        (TABLE, {"target": "incme"}, "has `age`, .*Did you mean `income`"),
        (TABLE, {"target": "income", "leave_out": ["agee"]}, "`--leave-out` names .*`age`"),
        (TABLE, {"target": "income", "text": "income"}, "is the target, and cannot be an input"),
        (TABLE.replace("50", "fifty"), {"target": "income"}, "line 3: the number column `age` hol"),
        (TABLE.replace("50", ""), {"target": "income"}, "line 3: the number column `age` is empty"),
        (TABLE.replace("50", "nan"), {"target": "income"}, "line 3: `age` is nan"),
        (TABLE.replace("50", "1e99"), {"target": "income"}, "line 3: `age` is 1e99"),
        (TABLE.replace("high", " "), {"target": "income"}, "line 3: the target `income` is missin"),
        (TABLE.replace("high", "low"), {"target": "income"}, "has 1 class"),
        (TABLE.replace(",Bonn,high", ",high"), {"target": "income"}, "line 3 has 3 cells"),
        (TABLE.replace("city", "age"), {"target": "income"}, "names the column `age` twice"),
        ("a,b\n", {"target": "a"}, "has a first line and no rows"),
        ("  \n", {"target": "a"}, "is empty"),
        ("a,b\n1,0\n2,1\n", {"target": "b"}, "too few training rows"),
        ('a,b\n"1,0\n2,1\n', {"target": "b"}, "line 3: unexpected end of data"),
        (TABLE, {"target": ["income", "city"]}, "`classification` has one target column"),
        (TABLE, {"target": "income", "image_size": (2, 2)}, "`image_size` does not apply to"),
        (TABLE, {"target": "income", "task": "tokens"}, "Tokens are read from CoNLL"),
        (TABLE, {"target": "income", "task": "regresion"}, "Did you mean `regression`"),
        (TABLE, {"target": "income", "task": "regression"}, "line 2: the number column `income`"),
        (
            TABLE,
            {"target": "income", "classes": ["low", "hihg"]},
            "line 3 is of class `high`.*hihg",
        ),
        (
            "text,y\nhello,0\n?!,1\n",
            {"target": "y", "text": "text"},
            "line 3: the text `text` is",
        ),
    ],
)
def test_faults_of_a_table_are_named_by_line(table, text, options, reason):
    with pytest.raises(ValueError, match=reason):
        load_task(table(text), **options)


def test_faults_between_files(table, tmp_path):
    train = table(rows())
    other = table(rows(8).replace("no\n", "maybe\n"), "test.csv")
    with pytest.raises(ValueError, match=r"test.csv`, line 2 is of class `maybe`, which is none"):
        load_task(train, target="label", test=other)
    lacking = table("x,label\n1,no\n", "test.csv")
    with pytest.raises(ValueError, match=r"test.csv` lacks the column `kind` that"):
        load_task(train, target="label", test=lacking)
    latin = tmp_path / "latin.csv"
    latin.write_bytes("x,y\n1,größe\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.csv`, line 2: byte 0xf6 is not UTF-8"):
        load_task(latin, target="y")
    (tmp_path / "half.csv.gz").write_bytes(gzip.compress(rows().encode())[:50])
    with pytest.raises(ValueError, match=r"half.csv.gz` is damaged or no gzip file"):
        load_task(tmp_path / "half.csv.gz", target="y")
    with pytest.raises(ValueError, match=r"missing.csv` does not exist"):
        load_task(tmp_path / "missing.csv", target="y")
    many = "x,y\n" + "".join(f"id{i},{i % 2}\n" for i in range(300))
    with pytest.raises(ValueError, match=r"holds 300 different texts.*--leave-out x"):
        load_task(table(many, "many.csv"), target="y")
    unknown = table(rows(8).replace(",a,", ",c,"), "test.csv")
    notes = load_task(train, target="label", test=unknown).notes
    assert any("4 cells of" in note and "are 0 everywhere" in note for note in notes)


# ---------------------------------------------------------------- tokens

SENTENCE = "Ada\tB-person\nLovelace\tI-person\nwrote\tO\n\nIn\tO\nBern\tB-place\n\n"


def test_sentences_become_numbers_and_tags(table):
    data = load_task(table(SENTENCE * 10, "a.conll"), "tokens", test=table(SENTENCE, "b.bio"))
    assert data.class_names == ("O", "B-person", "I-person", "B-place")
    assert data.inputs["length"] == 3
    np.testing.assert_array_equal(data.test.y, [[1, 2, 0], [0, 3, -1]])
    words = data.inputs["vocabulary"]
    assert [words[i] for i in data.test.x[1]] == ["In", "Bern", ""]
    short = load_task(table(SENTENCE * 10, "a.conll"), "tokens", length=2)
    assert short.train.x.shape[1] == 2
    assert any("were cut to 2 tokens" in note for note in short.notes)


def test_other_forms_of_conll(table):
    text = (
        "-DOCSTART- -X- O O\n\n# sent_id = 1\nEU NNP I-NP B-ORG\n# NN I-NP O\n\n"
        "#tag NN B-NP O\r\nrose VB B-VP O\r\n"
    )
    data = load_task(table(text * 8, "a.conll"), "tokens")
    assert data.class_names == ("O", "B-ORG")
    assert "#" in data.inputs["vocabulary"]
    assert "#tag" in data.inputs["vocabulary"]
    speech = "EU\tNOUN\nrose\tVERB\n\n"
    assert load_task(table(speech * 8, "a.conll"), "tokens").class_names == ("NOUN", "VERB")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (SENTENCE.replace("B-person", "O"), r"line 2: `I-person` follows `O`, and does not follow"),
        (SENTENCE.replace("I-person", "I-place"), r"line 2: `I-place` follows `B-person`"),
        (SENTENCE.replace("B-place", "S-place"), r"line 6: the tag `S-place` does not follow BIO"),
        (SENTENCE.replace("\tO\n\nIn", "\n\nIn"), r"line 3: `wrote` has no tag"),
        (SENTENCE.replace("B-place", "B-"), r"line 6: the tag `B-` does not follow BIO"),
        ("# only = a comment\n", "holds no sentences"),
    ],
)
def test_faults_of_tags_are_named_by_line(table, text, reason):
    with pytest.raises(ValueError, match=reason):
        load_task(table(text, "a.conll"), "tokens")


def test_a_tag_that_training_has_not(table):
    train, test = (
        table(SENTENCE * 4, "a.conll"),
        table(SENTENCE.replace("place", "plac"), "b.conll"),
    )
    with pytest.raises(
        ValueError, match=r"from line 5 has the tag `B-plac`.*Did you mean `B-place`"
    ):
        load_task(train, "tokens", test=test)
    with pytest.raises(ValueError, match="holds the task `tokens`"):
        load_task(train, "classification")


# ---------------------------------------------------------------- folders of images


@pytest.fixture
def folder(tmp_path):
    def write(*paths, size=(6, 4), mode="RGB"):
        for i, path in enumerate(paths):
            target = tmp_path / "images" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            color = 20 * i if mode == "L" else (20 * i, 10, 5)
            Image.new(mode, size, color).save(target)
        return tmp_path / "images"

    return write


def test_folders_are_classes(folder):
    root = folder(
        *(
            f"{split}/{name}/{i}.png"
            for split in ("train", "test")
            for name in "ba"
            for i in range(5)
        )
    )
    (root / "train" / "a" / "notes.txt").write_text("x")
    data = load_task(root)
    assert (data.class_names, data.train.x.shape[1:]) == (("a", "b"), (4, 6, 3))
    assert data.sizes == {"train": 8, "validation": 2, "test": 10}
    assert data.train.x.max() <= 1
    assert data.inputs == {"kind": "images", "scale": 255}
    assert any("1 files of" in note for note in data.notes)
    resized = load_task(root, image_size=(3, 3))
    assert resized.train.x.shape[1:] == (3, 3, 3)


def test_gray_images_and_orientation(folder):
    root = folder(*(f"{name}/{i}.png" for name in "ab" for i in range(6)), mode="L")
    assert load_task(root).train.x.shape[1:] == (4, 6, 1)
    folder("a/9.png", mode="RGB")
    assert load_task(root).train.x.shape[1:] == (4, 6, 3)
    turned = Image.new("RGB", (4, 6))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(root / "b" / "turned.jpg", exif=exif)
    assert load_task(root).train.x.shape[1:] == (4, 6, 3)


def test_faults_of_folders_name_the_file(folder, tmp_path):
    root = folder(*(f"train/{name}/{i}.png" for name in "ab" for i in range(5)))
    folder("test/a/0.png", "test/c/1.png")
    with pytest.raises(ValueError, match=r"c/1.png` is of class `c`, which is none of those"):
        load_task(root)
    (root / "test" / "c" / "1.png").rename(root / "test" / "a" / "2.png")
    (root / "test" / "c").rmdir()
    folder("train/b/8.png", size=(5, 5))
    with pytest.raises(ValueError, match=r"b/8.png` has 5 x 5 pixels and .*--image-size"):
        load_task(root)
    (root / "train" / "b" / "8.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b/8.png` cannot be read as an image"):
        load_task(root)
    Image.fromarray(np.full((4, 6), 40_000, np.uint16)).save(root / "train" / "b" / "8.png")
    with pytest.raises(ValueError, match=r"b/8.png` cannot be read as an image: its pixels are"):
        load_task(root)
    (root / "train" / "c").mkdir()
    with pytest.raises(ValueError, match=r"train/c` holds no images"):
        load_task(root)
    with pytest.raises(ValueError, match="holds the task `classification`"):
        load_task(root, "regression")
    for name in ("nothing", "digit", str(tmp_path / "images" / "train" / "a" / "0.png")):
        with pytest.raises(ValueError, match="are no data"):
            load_task(name)


# ---------------------------------------------------------------- arrays


def test_arrays_are_taken_as_they_are(tmp_path):
    path = tmp_path / "a.npz"
    x, y = np.arange(60.0).reshape(20, 3), np.arange(20) % 2
    np.savez(path, x=x, y=y)
    data = load_task(path)
    np.testing.assert_array_equal(data.train.x, x[data.train.index])
    np.savez(path, left_train=x, right_train=x[:, :1], y_train=y, class_names=["no", "yes"])
    several = load_task(path)
    assert set(several.train.x) == {"left", "right"}
    assert several.class_names == ("no", "yes")
    np.savez(path, x_train=np.full((20, 4, 4), 255, "uint8"), y_train=y)
    assert load_task(path).train.x.shape[1:] == (4, 4, 1)
    assert load_task(path).train.x.max() == 1
    np.savez(path, x=x, y=np.where(np.arange(20) % 3, y, -1))
    assert load_task(path).labeled.sum() < len(load_task(path).train)


@pytest.mark.parametrize(
    ("arrays", "task", "reason"),
    [
        ({"x": np.zeros((4, 2))}, "classification", "no labels to train on"),
        ({"y": np.zeros(4)}, "classification", "no inputs for it"),
        (
            {"x_train": np.zeros((4, 2)), "x_test": np.zeros(2), "y_train": np.zeros(4)},
            "classification",
            "holds `x_test` and no `y_test`",
        ),
        ({"x": np.zeros((4, 2)), "y": np.array([0, 1, np.nan, 0])}, "regression", "row 2 of `y`"),
        ({"x": np.zeros((4, 2)), "y": np.array([0, 1, -2, 0])}, "classification", "row 2 .*-2"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(3)}, "regression", "4 rows and its labels 3"),
        ({"x": np.zeros((4, 2)), "y": np.zeros((4, 2))}, "tokens", None),
        ({"x": np.zeros((4, 2)), "y": np.zeros(4)}, "multilabel", "shape .rows, labels."),
        ({"x": np.zeros((4, 2)), "y": -np.ones((4, 2))}, "ranking", "gains of a ranking are 0"),
        ({"x": np.full((4, 2), np.inf), "y": np.zeros(4)}, "regression", "first in row 0"),
        ({"x": np.full((4, 2), "a"), "y": np.zeros(4)}, "regression", "dtype <U1"),
        ({"x": np.zeros((4, 2)), "y": np.full(4, -1)}, "classification", "No training|too few"),
        (
            {
                "x_train": np.zeros((8, 2)),
                "y_train": np.arange(8) % 2,
                "x_test": np.zeros((2, 2)),
                "y_test": np.array([0, 2]),
            },
            "classification",
            "row 1 of `y_test` is of class `2`|names",
        ),
    ],
)
def test_faults_of_arrays(tmp_path, arrays, task, reason):
    np.savez(tmp_path / "a.npz", **arrays)
    if reason is None:
        assert load_task(tmp_path / "a.npz", task).task == task
        return
    with pytest.raises(ValueError, match=reason):
        load_task(tmp_path / "a.npz", task)


def test_digits_by_name():
    data = load_task("digits")
    assert (data.units, data.sizes["test"]) == (10, 359)
    with pytest.raises(ValueError, match="holds the task `classification`"):
        load_task("digits", "regression")
