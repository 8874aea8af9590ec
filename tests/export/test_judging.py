"""Files that are of no use, whatever accuracy they keep, and what their failure says."""

import judging
import keras
import numpy as np
import pytest
from keras import layers
from scipy.stats import spearmanr
from sklearn import metrics as sk

import keras_kd.export
from keras_kd.export.verification import acceptance as budget
from keras_kd.export.verification import scores, useless_files

rng = np.random.default_rng(5)


def find(report, name):
    return next(a for a in report.artifacts if f"{a.format} {a.precision}" == name)


def rows(*, before, after, labels=None, kind="classes", probabilities=False, precision="int8"):
    """An entry of the manifest, measured, and the Keras model's figures."""
    kinds = {"y": {"kind": kind, "probabilities": probabilities}}
    given = {} if labels is None else {"y": labels}
    found = judging.compare({"y": before}, {"y": after}, given, kinds, scores=True)
    keras_figures = {"y": {"scores": scores.scores(before, labels, kind, probabilities)}}
    row = {
        "format": "tflite",
        "precision": precision,
        "status": "passed",
        "stage": None,
        "reason": "",
        "bytes": 10,
        "latency_low_ms": 1.0,
        "metrics": found,
        "contents": {"flex": [], "weight_bits": {"8": 9}, "float_operators": []},
    }
    return row, keras_figures


def judge(row, before, max_drop=0.01, **given):
    judging.judge([row], max_drop, False, before, **given)
    return row["status"], row["reason"]


def rare(positives=40, count=1000):
    """Logits that rank well and decide 0 for every row, and 0/1 labels."""
    labels = (np.arange(count) < positives).astype(int)
    logits = rng.normal(-6, 1, (count, 1)) + 2 * labels[:, None]
    return logits.astype("float32"), labels


@pytest.mark.parametrize("max_drop", [None, 0.01])
@pytest.mark.parametrize("after", ["constant", "nearly", "two values"])
def test_constant_answers_fail_though_accuracy_is_kept(after, max_drop):
    logits, labels = rare()
    got = {
        "constant": np.full_like(logits, logits.mean()),
        "nearly": logits.mean() + 0.01 * logits,
        "two values": np.where(np.arange(1000)[:, None] % 2, -6.0, -5.9),
    }[after].astype("float32")
    row, before = rows(before=logits, after=got, labels=labels, kind="binary")
    assert row["metrics"]["agreement"] == 1.0
    assert row["metrics"]["outputs"]["y"]["drop"] == 0
    status, reason = judge(row, before, max_drop)
    assert status == "failed"
    was, now = (sk.roc_auc_score(labels, array[:, 0]) for array in (logits, got))
    assert f"AUC {was:.3f} becomes {now:.3f}" in reason


def test_a_ranking_that_is_lost_fails_behind_equal_accuracy():
    logits, labels = rare(100)
    noise = rng.normal(0, 1.2, logits.shape).astype("float32")
    row, before = rows(before=logits, after=logits + noise, labels=labels, kind="binary")
    was, now = (sk.roc_auc_score(labels, a[:, 0]) for a in (logits, logits + noise))
    assert was - now > 0.05
    status, reason = judge(row, before)
    assert status == "failed"
    assert f"AUC falls from {was:.3f} to {now:.3f}" in reason
    # A hundredth of the noise is what quantization brings.
    row, before = rows(before=logits, after=logits + noise / 100, labels=labels, kind="binary")
    assert judge(row, before) == ("passed", "")


@pytest.mark.parametrize(("spread", "status"), [(1.0, "passed"), (4.0, "failed")])
def test_ranks_that_are_lost_beside_a_few_large_answers_fail(spread, status):
    # Prices: 8 bits for the dearest leave one answer for nearly all others.
    own = np.random.default_rng(6)
    truth = np.exp(own.normal(0, spread, (500, 1))).astype("float32")
    before = (truth * np.exp(own.normal(0, 0.1, truth.shape))).astype("float32")
    step = before.max() / 255
    after = (np.round(before / step) * step).astype("float32")
    row, figures = rows(before=before, after=after, labels=truth, kind="values")
    assert row["metrics"]["sqnr"] > 20
    ranks = [spearmanr(truth[:, 0], array[:, 0]).statistic for array in (before, after)]
    assert (ranks[1] < 0.5 * ranks[0]) == (status == "failed")
    assert judge(row, figures)[0] == status
    if status == "failed":
        assert f"falls from {ranks[0]:.3f} to {ranks[1]:.3f}" in row["reason"]


def test_a_class_that_is_lost_fails_by_its_name():
    labels = np.repeat([0, 1, 2], [480, 480, 40])
    logits = 4 * np.eye(3)[labels] + rng.normal(0, 1, (1000, 3))
    got = logits.copy()
    got[np.flatnonzero(labels == 2)[:30], 2] -= 9
    row, before = rows(before=logits.astype("float32"), after=got, labels=labels)
    named = {"y": ["cat", "dog", "owl"]}
    status, reason = judge(row, before, 0.1, labels=named)
    assert status == "failed"
    assert "class `owl` keeps" in reason
    was, now = (np.mean(a.argmax(1)[labels == 2] == 2) for a in (logits, got))
    assert f"{100 * now:.1f} % of its 40 rows" in reason
    assert f"finds {100 * was:.1f} %" in reason
    # Three rows of five are an accident.
    few = np.flatnonzero(labels != 2).tolist() + np.flatnonzero(labels == 2)[25:30].tolist()
    row, before = rows(before=logits[few].astype("float32"), after=got[few], labels=labels[few])
    assert judge(row, before, 0.1)[0] == "passed"


def test_noise_without_decisions_to_excuse_it_fails_without_a_limit():
    values = rng.normal(size=(200, 2)).astype("float32")
    noisy = values + rng.normal(0, 0.8, values.shape)
    row, before = rows(before=values, after=noisy, kind="values")
    status, reason = judge(row, before, None)
    assert status == "failed"
    noise = np.mean((noisy.astype("float32") - values) ** 2)
    # The mean of the values, small as it is, is no signal.
    signal = 10 * np.log10(values.var(axis=0).mean() / noise)
    assert f"{signal:.1f} dB of signal over noise" in reason
    # A large constant hides the same noise from the SQNR, and not from what varies.
    row, before = rows(before=values + 50, after=noisy + 50, kind="values")
    assert row["metrics"]["sqnr"] > 30
    assert judge(row, before, None)[0] == "failed"


def test_what_tells_classes_apart_is_measured_without_what_they_share():
    """A large part that all classes of a row have keeps the decibels; a softmax never sees it."""
    apart = rng.normal(0, 0.1, (300, 3))
    shared = rng.normal(0, 30, (300, 1))
    before, labels = (apart + shared).astype("float32"), apart.argmax(1)
    after = (rng.normal(0, 0.1, (300, 3)) + shared).astype("float32")
    row, figures = rows(before=before, after=after, labels=labels)
    assert row["metrics"]["sqnr"] > 40
    centered = [a.astype("float64") - a.mean(1, keepdims=True) for a in (before, after)]
    signal = np.sum((centered[0] - centered[0].mean(0)) ** 2)
    want = 10 * np.log10(signal / np.sum((centered[0] - centered[1]) ** 2))
    assert row["metrics"]["outputs"]["y"]["apart"] == pytest.approx(want, abs=1e-3)
    status, reason = judge(row, figures, None)
    assert (status, "less than 5 dB; AUC" in reason) == ("failed", True)


def test_noise_that_leaves_the_decisions_is_flagged():
    labels = rng.integers(0, 3, 300)
    logits = (6 * np.eye(3)[labels]).astype("float32") + rng.normal(0, 0.3, (300, 3))
    got = logits * 3
    row, before = rows(before=logits.astype("float32"), after=got, labels=labels)
    assert judge(row, before)[0] == "passed"
    assert any("dB of signal over noise alone" in flag for flag in row["flags"])
    row, before = rows(before=logits.astype("float32"), after=rng.permutation(got))
    status, reason = judge(row, before, None)
    assert status == "failed"
    assert "dB of signal over noise" in reason


def test_units_of_another_size_are_judged_one_by_one():
    values = (rng.normal(size=(300, 3)) * [1000, 1, 1000]).astype("float32")
    got = np.round(values / 8) * 8
    got[:, 1] = 0
    row, before = rows(before=values, after=got, kind="values")
    assert row["metrics"]["sqnr"] > 40
    causes = useless_files.Causes({}, {"y": values}, [], {})
    status, reason = judge(row, before, 0.01, causes=causes)
    assert status == "failed"
    assert "unit 1 hardly change" in reason
    assert f"from {values[:, 1].std():.3g} to" in reason
    assert "an output of its own" in reason
    # The score of a class that is never likely may round to nothing; that is flagged by its name.
    shares = np.float32([[0.6, 0.4, 1e-4], [0.3, 0.7, 2e-4]] * 50)
    flat = np.round(shares * 256) / 256
    row, before = rows(before=shares, after=flat, kind="classes", probabilities=True)
    assert judge(row, before, labels={"y": ["a", "b", "c"]})[0] == "passed"
    assert any("unit `c` hardly change" in flag for flag in row["flags"])


def test_scales_that_are_no_numbers_fail():
    logits = rng.normal(size=(50, 3)).astype("float32")
    row, before = rows(before=logits, after=logits)
    row["scales"] = {
        "inputs": {},
        "broken": [{"tensor": "cell/add", "scale": "inf", "finite": False}],
    }
    causes = useless_files.Causes({}, {"y": logits}, ["cell"], {})
    status, reason = judge(row, before, None, causes=causes)
    assert status == "failed"
    assert "`cell/add` of layer `cell` is inf" in reason


@pytest.fixture(scope="module")
def credit(tmp_path_factory):
    """A rare class, and a feature a million times as large: (x, y, model, report)."""
    x = rng.normal(size=(1200, 6)).astype("float32")
    y = (2 * x[:, 1] + x[:, 2] + rng.normal(size=1200) > 4.2).astype(int)
    x[:, 0] *= 1e6
    norm = layers.Normalization(mean=np.zeros(6), variance=[1e12, 1, 1, 1, 1, 1], name="norm")
    model = keras.Sequential(
        [
            keras.Input((6,), name="account"),
            norm,
            layers.Dense(8, activation="relu", name="hidden"),
            layers.Dense(1, name="risk"),
        ]
    )
    hidden = np.zeros((6, 8))
    hidden[1, :4], hidden[2, 4:] = 1, 1
    offsets = np.tile([3.0, 1.0, -1.0, 2.0], 2)
    last = np.repeat([[0.5], [0.25]], 4, axis=0)
    model.layers[1].set_weights([hidden, offsets])
    model.layers[2].set_weights([last, np.float32([-9])])
    report = keras_kd.export(
        model,
        tmp_path_factory.mktemp("credit") / "credit",
        precisions="int8",
        calibration=x[:300],
        evaluation=(x, y),
        labels=["good", "bad"],
    )
    return x, y, model, report


@pytest.mark.parametrize("fmt", ["tflite", "onnx"])
def test_features_of_very_different_size_are_named(credit, fmt):
    x, y, _, report = credit
    file = find(report, f"{fmt} int8")
    assert not file.passed
    assert file.agreement == 1.0 or file.accuracy > 0.9
    assert "Input `account` has one scale for all its features" in file.reason
    assert "set by feature 0" in file.reason
    assert "5 of 6 features (1, 2, 3, 4, 5)" in file.reason
    assert "Most of the signal is lost at layer `" in file.reason
    for cure in ("outside the model", "an input of their own", "`mixed`"):
        assert cure in file.reason
    logits = keras_kd.export.load(file.path)(x)
    want = sk.roc_auc_score(y, logits[:, 0])
    got = file.details["metrics"]["outputs"]["risk"]["scores"]["auc"]
    assert got == pytest.approx(want, abs=2e-3)


@pytest.mark.parametrize("fmt", ["tflite", "onnx"])
def test_mixed_is_tried_without_a_float32_file_being_asked_for(credit, fmt):
    x, y, model, report = credit
    mixed = find(report, f"{fmt} mixed")
    assert mixed.passed, mixed.reason
    want = sk.roc_auc_score(y, model.predict(x, verbose=0)[:, 0])
    assert mixed.details["metrics"]["outputs"]["risk"]["scores"]["auc"] == pytest.approx(
        want, abs=0.01
    )
    assert report.best.precision == "mixed"
    assert {path.suffix for path in report.folder.iterdir()} == {
        ".tflite",
        ".onnx",
        ".json",
        ".npz",
    }
    assert len(list(report.folder.glob("*float32*"))) == 0


def test_reports_say_what_the_task_asks_for(credit, tmp_path):
    x, y, model, report = credit
    logits = model.predict(x, verbose=0)
    card = report.scorecard()
    row = card.rows()[0]
    assert row["name"] == "keras"
    assert row["auc"] == pytest.approx(sk.roc_auc_score(y, logits[:, 0]))
    assert row["macro_f1"] == pytest.approx(sk.f1_score(y, logits[:, 0] > 0, average="macro"))
    classes = card.classes()
    assert [entry["class"] for entry in classes] == ["good", "bad"]
    assert [entry["support"] for entry in classes] == np.bincount(y).tolist()
    recall = sk.recall_score(y, logits[:, 0] > 0, average=None)
    np.testing.assert_allclose([entry["keras_recall"] for entry in classes], recall)
    text = report.table()
    html = report.save_html(tmp_path / "r.html").read_text()
    markdown = report.save_card(tmp_path / "c.md").read_text()
    for document in (text, html, markdown):
        assert "bad" in document
        assert str(np.bincount(y)[1]) in document
        assert f"{row['auc']:.3f}"[:5] in document
    assert max(map(len, text.splitlines())) <= 80


def test_why_mixed_was_not_tried_is_said():
    class Work:
        def __init__(self):
            self.layers = {}

        def compare_layers(self, row, stage):
            pass

    from keras_kd.export.mixed import try_mixed

    logits = rng.normal(size=(50, 3)).astype("float32")

    def row(precision):
        entry = {**rows(before=logits, after=-logits)[0], "precision": precision, "file": "f"}
        return judging.artifact(entry)

    def reasons(entries, aware):
        def judge(found):
            return budget.judge(found, None, aware)

        found = try_mixed(Work(), judge(entries), judge, lambda fmt: "a/f", aware)
        return [flag for row in found for flag in row.flags if "`mixed`" in flag]

    assert "quantization-aware model" in reasons([row("int8")], True)[0]
    assert "no layer of the int8 file" in reasons([row("int8")], False)[0]
    assert "add that to `precisions`" in reasons([row("uint8")], False)[0]
    assert len(reasons([row("int8"), row("uint8")], False)) == 1


def test_a_gru_whose_start_state_was_always_zero_fails_in_int16(tmp_path):
    keras.utils.set_random_seed(2)
    steps, kernel = keras.Input((6, 4), name="steps"), layers.GRU(8, name="gru")
    model = keras.Model(steps, layers.Dense(4, name="word")(kernel(steps)))
    model.layers[1].set_weights([w + 0.3 * rng.normal(size=w.shape) for w in kernel.get_weights()])
    x = rng.normal(size=(120, 6, 4)).astype("float32")
    y = model.predict(x, verbose=0).argmax(1)
    report = keras_kd.export(
        model,
        tmp_path / "gru",
        formats="tflite",
        precisions=("int8", "int16x8"),
        calibration=x[:60],
        evaluation=(x, y),
        max_drop=None,
        mixed=False,
    )
    assert find(report, "tflite int8").passed
    wide = find(report, "tflite int16x8")
    if wide.sqnr is not None and wide.sqnr > 20:
        pytest.fail("the converter's scale does no harm any more: say so in the documentation")
    assert not wide.passed
    assert "of layer `gru`" in wide.reason
    assert "0 in all calibration samples" in wide.reason
    assert "Take int8" in wide.reason


def test_what_float16_cannot_hold_is_named(tmp_path):
    norm = layers.Normalization(mean=[4e6, 0.0], variance=[1e12, 1], name="amounts")
    model = keras.Sequential([keras.Input((2,), name="x"), norm, layers.Dense(2, name="y")])
    model.set_weights([np.eye(2), np.zeros(2)])
    x = (rng.normal(size=(64, 2)) * [1e6, 1] + [4e6, 0]).astype("float32")
    report = keras_kd.export(
        model, tmp_path / "half", precisions=("float16",), evaluation=x, max_drop=None
    )
    for fmt in ("tflite", "onnx"):
        half = find(report, f"{fmt} float16")
        assert not half.passed
        assert "beyond float16's range" in half.reason
        assert "`amounts`" in half.reason
        assert "4e+06" in half.reason
        assert "converted wrongly" not in half.reason


def test_results_beyond_float16_are_flagged_where_they_are_right_here(tmp_path):
    kernel = keras.initializers.Constant(300.0)
    large = layers.Dense(4, activation="relu", name="large", kernel_initializer=kernel)
    model = keras.Sequential(
        [keras.Input((3,), name="x"), large, layers.Rescaling(1e-3, name="down"), layers.Dense(2)]
    )
    x = (1000 * rng.random((40, 3))).astype("float32")
    report = keras_kd.export(model, tmp_path / "large", precisions="float16", evaluation=x)
    for file in report.artifacts:
        assert file.passed, file.reason
        (flag,) = [flag for flag in file.flags if "float16 ends at 65,504" in flag]
        assert "`large`" in flag
        assert "infinite on GPUs" in flag


@pytest.mark.parametrize(
    ("noise", "operators", "precision", "status"),
    [
        (0.3, {"SUM": 1}, "int16x8", "failed"),
        (0.3, {"MEAN": 1}, "int16x8", "passed"),
        (0.3, {"SUM": 1}, "int8", "passed"),
        (0.01, {"SUM": 1}, "int16x8", "passed"),
    ],
)
def test_sums_of_16_bit_integers_that_lose_their_rows_fail(noise, operators, precision, status):
    drawn = np.random.default_rng(3)
    values = drawn.normal(size=(200, 3)).astype("float32")
    after = values + noise * drawn.normal(size=values.shape).astype("float32")
    row, before = rows(before=values, after=after, kind="values", precision=precision)
    row["contents"]["operators"] = operators
    found, reason = judge(row, before, None)
    assert found == status
    assert ("SUM" in reason) == (status == "failed")
