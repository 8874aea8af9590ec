"""What is wrong with the data of a loader is one error, with file and row, before any work."""

import re

import numpy as np
import pytest

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
    "form", ["{},5", "{}%", "${}", "{},000.5", "{} 000", "-{}'000,25", "\u20ac{}", "{} \u20ac"]
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
