"""What is wrong with the data of a loader is one error, with file and row, before any work."""

import re

import numpy as np
import pytest
from PIL import Image

from keras_kd.datasets import load, load_task

X = np.arange(20 * 16).reshape(20, 4, 4).astype("uint8")
Y = np.arange(20) % 2
ROWS = "x,text,y\n" + "".join(f"{i},hello word{i % 3},{i % 2}\n" for i in range(20))
TAGS = "Ada\tB-person\nLovelace\tI-person\nwrote\tO\n\nIn\tO\nBern\tB-place\n\n"


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        if isinstance(content, str):
            (tmp_path / name).write_text(content, encoding="utf-8")
        else:
            np.savez(tmp_path / name, **content)
        return tmp_path / name

    return write


def split(**more):
    return {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y} | more


def blank(row):
    return {"x": np.where(np.arange(20)[:, None, None] == row, np.nan, X), "y": Y}


@pytest.mark.parametrize(
    ("train", "test", "reason"),
    [
        (split(x_test=X / 255), None, r"`x` of the training rows in .*a.npz` holds images of uns"),
        (split(), {"x": X / 255, "y": Y}, r"test rows in .*b.npz` holds float64"),
        (
            {"x": X / 255, "y": Y},
            {"x": X, "y": Y},
            r"`x` of the test rows in .*b.npz` holds images",
        ),
        (split(), {"x": X[:, :3], "y": Y}, r"test inputs of .*b.npz` have the shapes \(3, 4, 1\)"),
        ({"x": X / 1, "y": Y}, blank(7), r"test rows of .*b.npz` holds NaN .* in row 7"),
        ({"x": X, "y": Y}, {"x": X, "y": Y + 1}, r"b.npz`: row 1 of `y` is of class `2`, which no"),
        (split(y_train=2 * Y, y_test=Y), None, r"a.npz`: row 1 of `y_test` is of class `1`, which"),
        (split(sample_rate=8000), {"x": X, "y": Y, "sample_rate": 16000}, r"b.npz` .*16000.*8000"),
        (split(sample_rate=np.array([0])), None, "a.npz` holds the `sample_rate` 0"),
        (split(class_names=["a", "a"]), None, "a.npz` name the class `a` twice"),
        (
            split(class_names=["a", "b"]),
            {"x": X, "y": Y, "class_names": ["b", "a"]},
            r"b.npz` has the `class_names` \['b', 'a'\], and .*a.npz` \['a', 'b'\]",
        ),
    ],
)
def test_arrays(written, train, test, reason):
    options = {} if test is None else {"test": written("b.npz", test)}
    with pytest.raises(ValueError, match=reason):
        load_task(written("a.npz", train), **options)


def test_arrays_keep_the_rate(written):
    data = load_task(written("a.npz", {"x": X / 255, "y": Y, "sample_rate": 8000}))
    assert data.inputs == {"kind": "arrays", "sample_rate": 8000}
    both = {"left": X / 255, "right": X / 255, "y": Y, "sample_rate": 8000}
    assert set(load_task(written("a.npz", both)).train.x) == {"left", "right"}


def test_images_by_name(written):
    with pytest.raises(ValueError, match=r"a.npz` holds the label 1 in row 3, and no training"):
        load(written("a.npz", split(y_train=2 * Y, y_test=np.array([0, 0, 2, 1] * 5))))
    with pytest.raises(ValueError, match=r"a.npz` holds the label 2, but .* first in row 1"):
        load(written("a.npz", split(y_test=Y + 1)))
    with pytest.raises(ValueError, match=r"a.npz` name `a` twice"):
        load(written("a.npz", split(class_names=["a", "a"])))


@pytest.mark.parametrize(
    ("changed", "options", "reason"),
    [
        (("hello word1", "\u200b"), {"text": "text"}, "a.csv`, line 3: the text `text` is empty"),
        (("hello word1", "\u00a0 \u2060"), {"text": "text"}, "line 3: the text `text` is empty"),
        (("", ""), {"leave_out": ["text"], "classes": ["0", "1", "0"]}, "name the class `0` twice"),
        (("hello word1", "a\0b"), {"text": "text"}, "a.csv`, line 3 holds a zero byte"),
        (("", ""), {"text": "Text"}, "`--text` names the column `Text`, .* Did you mean `text`"),
        (("", ""), {"text": "text", "length": 0}, "`length` is a whole number above 0.*length=0"),
        (("", ""), {"text": "text", "length": True}, "`length` is a whole number.*length=True"),
    ],
)
def test_tables(written, changed, options, reason):
    with pytest.raises(ValueError, match=reason):
        load_task(written("a.csv", ROWS.replace(*changed)), target="y", **options)


@pytest.mark.parametrize(
    "form",
    [
        *("{},5", "{}%", "${}", "{},000.5", "{} 000", "-{}'000,25", "\u20ac{}", "{} \u20ac"),
        *("\u2212{}", "({}.5)", "{}_000"),
    ],
)
def test_numbers_with_marks_are_no_categories(written, form):
    cells = [form.format(i) for i in range(20)]
    content = "x;y\n" + "".join(f"{cell};{i % 2}\n" for i, cell in enumerate(cells))
    table = written("a.csv", content)
    with pytest.raises(
        ValueError, match=f"a.csv`, line 2: .*`{re.escape(cells[0])}`.*--category x"
    ):
        load_task(table, target="y")
    assert load_task(table, target="y", categories=["x"]).train.x.shape[1] == 20


@pytest.mark.parametrize("form", ["1.{}.2", "{}0-{}9", "A{}", "{}:30", "{}/12", "555 123{}"])
def test_codes_are_categories(written, form):
    content = "x;y\n" + "".join(f"{form.format(i % 3, i % 3)};{i % 2}\n" for i in range(20))
    assert load_task(written("a.csv", content), target="y").train.x.shape[1] == 3


@pytest.mark.parametrize("task", ["regression", "multilabel"])
def test_a_target_is_read_as_no_category(written, task):
    with pytest.raises(
        ValueError, match=r"line 2: .*`text` holds the text .*or leave the row out\.$"
    ):
        load_task(written("a.csv", ROWS), task, target="text")


def test_folders_hold_one_kind(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/x.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"a` holds no recordings .*, but \.png.* and not both"):
        load_task(tmp_path)
    with pytest.raises(ValueError, match=r"`image_size` is \(0, 8\), but it is \(height, width\)"):
        load_task(tmp_path / "a", image_size=(0, 8))


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("x,text,y\n1,hello,0\n2,\u200d,1\n", "b.csv`, line 3: the text `text` is empty"),
        ("x,words,y\n1,hello,0\n", "b.csv` lacks the column `text`.* It has `x`, `words`, `y`"),
        ("1,hello,0\n2,hello,1\n", "b.csv` lacks the column `x`"),
        ("x,text,y\n1,hello,0\n2,hello,2\n", "b.csv`, line 3 is of class `2`, which is none"),
        ("x,text,y\n1,hello,0\n2,hello,\n", "b.csv`, line 3: the target `y` is missing"),
        ("x,text,y\n1,hello,0\n2,hello\n", "b.csv`, line 3 has 2 cells"),
    ],
)
def test_tables_of_the_test(written, test, reason):
    options = {"target": "y", "text": "text", "test": written("b.csv", test)}
    with pytest.raises(ValueError, match=reason):
        load_task(written("a.csv", ROWS), **options)


def test_spare_columns_are_told(written):
    test = written("b.csv", "x,text,z,y\n1,hello,5,0\n2,hello,5,1\n")
    data = load_task(written("a.csv", ROWS), target="y", leave_out=["text"], test=test)
    assert data.test.x.shape == (2, 1)
    assert any("b.csv` has `z` beside the columns of" in note for note in data.notes)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (("In\tO", "In\tDT\tO"), r"a.conll`, line 5: `In\tDT\tO` has 3 columns.* before it 2"),
        (("In\tO", "New York O"), r"line 5: `New York O` has 3 columns"),
        (("In\t", "\u200b\t"), r"line 5: `\u200b\tO` has no tag"),
        (("B-", "b-"), "line 1: the tag `b-person` does not follow BIO"),
        (("-p", "_p"), "line 1: the tag `B_person` does not follow BIO"),
        (("I-person", "I-place"), "line 2: `I-place` follows `B-person`"),
    ],
)
def test_tags(written, changed, reason):
    content = TAGS.replace(*changed)
    if changed[0] == "B-":
        content = content.replace("I-", "i-")
    with pytest.raises(ValueError, match=reason):
        load_task(written("a.conll", content), "tokens")


def test_tags_of_the_test(written):
    train = written("a.conll", TAGS * 10)
    for content, reason in (
        (TAGS.replace("B-person", "O"), "b.conll`, line 2: `I-person` follows `O`"),
        (TAGS.replace("B-place", "B-plase"), "b.conll`, the sentence from line 5 has .*`B-place`"),
        (TAGS.replace("Bern\t", "Bern\tNN\t"), "b.conll`, line 6: .* has 3 columns"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_task(train, "tokens", test=written("b.conll", content))


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_lines_end_as_they_do(written, end):
    path = written("a.conll", "")
    path.write_bytes((TAGS * 10).replace("\n", end).encode())
    assert load_task(path, "tokens").train.x.shape == (14, 3)
    path.write_bytes((TAGS * 2 + "In\tI-place\n").replace("\n", end).encode())
    with pytest.raises(ValueError, match="a.conll`, line 15: `I-place` follows `O`"):
        load_task(path, "tokens")


def test_a_vocabulary_has_a_word_a_line(written):
    words = written("v.txt", "\n[UNK]\nhello\u2028hello\nword1\n")
    data = load_task(written("a.csv", ROWS), target="y", text="text", vocabulary=words)
    assert data.inputs["vocabulary"] == ["", "[UNK]", "hello\u2028hello", "word1"]


NUMBERED = ["O", "B-A", "I-A", "B-B", "I-B"]


@pytest.mark.parametrize(
    ("names", "changed", "reason"),
    [
        (NUMBERED, {(7, 4): 2}, r"t.npz`: row 7 of `y`, position 4: `I-A` follows `O`.* `B-A`"),
        (NUMBERED, {(7, 2): 4, (9, 2): 4}, r"position 2: `I-B` follows `B-A`.*in 1 more rows"),
        (["O", "B-A", "E-A", "B-B", "I-B"], {}, "the class `E-A`, which does not follow BIO"),
        (["O", "B-A", "I-", "B-B", "I-B"], {}, "the class `I-`, which does not follow BIO"),
        (["O", "b-A", "i-A", "b-B", "i-B"], {}, "the class `b-A`, which does not follow BIO"),
        (["O", "B-A", "I-A", "X", "Y"], {}, "the class `X`, which does not follow BIO"),
        (["O", "B-A", "I-A", "B-B", "I-C"], {}, "the class `I-C` and no `B-C`"),
        (NUMBERED, {(7, 3): 2, (7, 2): -1}, None),
        (NUMBERED, {(7, 0): 2}, "1 of 30 rows begin with I-"),
        (["N", "V", "A", "P", "X"], {(7, 0): 2, (8, 4): 4}, None),
    ],
)
def test_numbered_tags(tmp_path, names, changed, reason):
    y = np.tile([0, 1, 2, 0, 3], (30, 1))
    for place, value in changed.items():
        y[place] = value
    x = np.arange(150).reshape(30, 5)
    path = tmp_path / "t.npz"
    np.savez(path, x=x, y=y, class_names=names)
    if reason and "begin with" not in reason:
        with pytest.raises(ValueError, match=reason):
            load_task(path, "tokens")
        return
    notes = " ".join(load_task(path, "tokens").notes)
    assert (reason or "split") in notes
    assert reason or "begin with" not in notes


def test_numbers_beyond_float32(tmp_path):
    x = np.linspace(0, 1, 40).reshape(20, 2)
    y = np.arange(20) % 2
    for name, task, arrays, reason in (
        (
            "x",
            "classification",
            (x * 1e300, y),
            "`x` of the .* rows .* float32 does not.* row 0",
        ),
        ("y", "regression", (x, x[:, :1] * 1e300), "row 1 of `y` .*float32 holds no numbers so"),
    ):
        np.savez(tmp_path / f"{name}.npz", x=arrays[0], y=arrays[1])
        with pytest.raises(ValueError, match=reason):
            load_task(tmp_path / f"{name}.npz", task)


def test_other_tags_are_no_spans(written):
    speech = "EU\tNOUN\nrose\tI_V\n\n"
    assert load_task(written("a.conll", speech * 8), "tokens").class_names == ("I_V", "NOUN")


def rows(labels, x="{}"):
    return "x,y\n" + "".join(f"{x.format(i)},{labels[i % len(labels)]}\n" for i in range(30))


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        (rows(["cat", "cat\u200b", "dog"]), {}, r"line 3 has the class 'cat\\u200b', which reads"),
        (rows(["cafe\u0301", "caf\u00e9"]), {}, r"line 3 has the class 'caf\\xe9'|line 2 has"),
        (rows("a"), {}, "a.csv` has 1 class"),
        (rows(range(30)), {}, "each of its 30 classes has one row.*--task regression"),
        (rows("ab", "{}").replace("\n4,", "\nNA,").replace("\n5,", "\n?,"), {}, "line 6: .* `NA`"),
        (rows("01").replace("\n1", "\nn/a"), {}, "line 3: the number column `x` holds the text"),
        (rows("01"), {"target": ["y", "y"]}, "`--target` names the column `y` twice"),
        ("," + rows("01"), {}, r"leaves a column unnamed.* `to_csv\(index=False\)`"),
        (rows("01"), {"leave_out": "xs"}, "`--leave-out` names the column `xs`"),
        (rows("01"), {"delimiter": ";"}, "has `x,y`. If cells are separated .* `--delimiter`"),
        (rows("01"), {"delimiter": '"'}, "`delimiter` is one character, and neither a quote"),
        (rows("01"), {"length": 5}, "`length` is for the words of a text.*--text COLUMN"),
        (rows("01"), {"text": "x", "standardize": True}, "`standardize` does not apply .* `x`"),
        (rows("01"), {"text": "x", "length": 10**11}, "30 rows of `length=100,000,000,000` need"),
    ],
)
def test_more_tables(written, content, options, reason):
    with pytest.raises(ValueError, match=reason):
        load_task(written("a.csv", content), **{"target": "y"} | options)


def test_names_as_text_are_no_list(written):
    with pytest.raises(TypeError, match="`classes` is a list of names"):
        load_task(written("a.csv", rows("ab")), target="y", classes="ab")


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ("\n\n" + rows("01").replace(",", ";"), "split"),
        ("sep=;\n" + rows("01").replace(",", ";"), "split"),
        ("\ufeff\ufeff" + rows("01"), "split"),
        (rows(["9007199254740993", "9007199254740992"]), "split"),
        (rows(["Cat", "cat"]), "`Cat` and `cat` differ by case alone"),
        (rows("015"), "3 of 6 classes have no training row: `2`, `3`, `4`"),
        (rows("01", "n{}"), "`x` of .* holds another text in each row"),
        (rows(["a", "b", "NA"]), "`NA` is a class of its own among those of `y`"),
        (rows([' "a"', " b", "a"]), "split"),
    ],
)
def test_tables_that_are_read(written, content, note):
    data = load_task(written("a.csv", content), target="y")
    assert re.search(note, " ".join(data.notes))
    assert sum(data.sizes.values()) == 30


def test_commas_in_the_names_of_a_table_with_tabs(written):
    content = "a, b\ty\n" + "".join(f"{i}\t{i % 2}\n" for i in range(20))
    assert load_task(written("a.tsv", content), target="y").train.x.shape[1] == 1


def test_a_standardized_number_that_is_none(written):
    train = written("a.csv", "x,y\n" + "".join(f"{i}e-37,{i % 2}\n" for i in range(20)))
    test = written("b.csv", "x,y\n1e-37,0\n3e38,1\n")
    with pytest.raises(ValueError, match="b.csv`, line 3: `x` is 3e38, which no float32 holds"):
        load_task(train, target="y", test=test, standardize=True)


def test_rows_that_are_trained_on_and_judged(written):
    path = written("a.npz", split(x_train=X, x_test=X[::-1], y_test=Y[::-1]))
    assert any(
        re.search(r"\d\d of 20 test rows stand among", note) for note in load_task(path).notes
    )


@pytest.mark.parametrize(
    ("arrays", "task", "reason"),
    [
        ({"x": X / 255, "y": 0 * Y + 3}, "classification", "a.npz` are the class `3`"),
        (split(x_val=X, y_val=Y), "classification", "`x_val`, .* are called `x_validation`"),
        ({"X_train": X, "y_train": Y}, "classification", "`X_train`. Rename it `x_train`"),
        ({"x_train": X, "y": Y}, "classification", "labels of `x_train` are called `y_train`"),
        ({"x": X, "y": np.array(["a", "b"])[Y]}, "classification", "a.npz` have dtype <U1"),
        ({"x": X / 255, "y": np.zeros((20, 3))}, "ranking", "a.npz` are 0 everywhere"),
    ],
)
def test_more_arrays(written, arrays, task, reason):
    with pytest.raises(ValueError, match=reason):
        load_task(written("a.npz", arrays), task)


def test_images_by_name_of_one_class(written):
    one = split(y_train=0 * Y + 3, y_test=0 * Y + 3)
    with pytest.raises(ValueError, match="a.npz` are the class `3`"):
        load(written("a.npz", one))
    with pytest.raises(ValueError, match="`x_val`, .* are called `x_validation`"):
        load(written("a.npz", split(x_val=X, y_val=Y)))
    names = np.array(["caf\u00e9".encode(), b"dog"])
    assert load(written("a.npz", split(class_names=names))).class_names == ("caf\u00e9", "dog")


@pytest.mark.parametrize("dtype", [">f4", ">f8", "longdouble", ">i4"])
def test_numbers_of_other_machines(written, dtype):
    x = np.arange(80).reshape(20, 4).astype(dtype)
    data = load_task(written("a.npz", {"x": x, "y": Y.astype(">i8"), "ids": Y}))
    assert data.train.x.dtype.isnative
    assert data.train.x.dtype.itemsize <= 8
    np.testing.assert_array_equal(data.train.x, x[data.train.index])
    assert any("has `ids` beside the inputs and labels" in note for note in data.notes)


def test_bytes_of_tokens_are_no_images(written):
    arrays = {"x": np.ones((20, 5, 3), "uint8"), "y": np.tile([0, 1, 2, 0, 1], (20, 1))}
    assert load_task(written("a.npz", arrays), "tokens").train.x.shape[1:] == (5, 3)


COUNTED = "1\tAda\t_\tB-P\n2-3\tdel\t_\tO\n2\tde\t_\tO\n2.1\tx\t_\tO\n3\tel\t_\tO\n\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (COUNTED * 6, "line 1: the first of 4 columns counts the tokens .*, as in CoNLL-U"),
        ("O\tIn\nB-P\tRome\n\n" * 6, "line 1: the tags stand in the first column"),
        ("In O\nRome B-P\n" * 6, "one sentence of 12 tokens: no empty line"),
        ("a\tB\nb\tI\nc\tO\nd\tI\n\n" * 6, "line 4: `I` follows `O`, .* begins with `B`"),
        (
            "a\tB-P\n\n" * 6 + "a\tB-P\u200b\nb\tO\n\n",
            r"sentence from line 13 has the class 'B-P\\u200b'",
        ),
    ],
)
def test_more_tags(written, content, reason):
    with pytest.raises(ValueError, match=reason):
        load_task(written("a.conll", content), "tokens")


def test_comments_and_tokens_that_begin_alike(written):
    content = "# newdoc id = 3\n# newpar\n# text=a b\na O\nb B-P\n\n# O\ntag B-P\n\n" * 5
    texts = load_task(written("a.conll", content), "tokens").train.texts
    assert set(texts) == {("a", "b"), ("#", "tag")}


def test_images_with_transparency_and_16_bits(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            image = Image.new("LA" if i else "L", (4, 4), (i, 9) if i else 7)
            image.save(tmp_path / name / f"{i}.png")
    data = load_task(tmp_path)
    assert data.train.x.shape[1:] == (4, 4, 1)
    assert any("8 images have a transparency" in note for note in data.notes)
    Image.fromarray(np.full((4, 4), 999, "uint16")).save(tmp_path / "a" / "x.png")
    with pytest.raises(ValueError, match=r"a/x\.png` .* 8 bits a channel are read: save it so"):
        load_task(tmp_path)
