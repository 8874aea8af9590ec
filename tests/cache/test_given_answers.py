"""Caches of answers that exist already."""

import keras
import numpy as np
import pytest
from small_models import kl, log_softmax

import keras_kd as kd
from keras_kd import cache
from keras_kd.cache.reader import Records
from keras_kd.teachers import CachedTeacher

VOCABULARY, TOKENS, ROWS = 11, 4, 20
RNG = np.random.default_rng(2)


def tokens_model():
    inputs = keras.Input((TOKENS,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, 3)(inputs)
    return keras.Model(inputs, keras.layers.Dense(VOCABULARY)(x), name="student")


@pytest.fixture
def tokens():
    x = RNG.integers(1, VOCABULARY, (ROWS, TOKENS))
    x[:, 2:][RNG.random((ROWS, TOKENS - 2)) < 0.5] = 0
    return x.astype("int32")


@pytest.fixture
def logits():
    return RNG.normal(0, 2, (ROWS, TOKENS, VOCABULARY))


def trained(path, x, student, **options):
    distiller = kd.Distiller(student, CachedTeacher(path))
    distiller.compile(
        keras.optimizers.SGD(0.0),
        None,
        distillation_loss=kd.losses.SoftTargets(),
        run_eagerly=True,
        **options,
    )
    return distiller.fit(x, batch_size=len(x), verbose=0).history["soft_targets"][0]


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_all_classes_teach_as_they_are(kind, tokens, logits, tmp_path):
    given = logits if kind == "logits" else np.exp(log_softmax(logits))
    mask = tokens != 0
    # What stands at padding is not looked at.
    given[~mask] = np.nan
    manifest = cache.write_answers(tmp_path, tokens, **{kind: given}, mask=mask, batch_size=6)
    assert manifest.complete
    assert (manifest.count, manifest.teacher["name"]) == (ROWS, "answers")
    student = tokens_model()
    each = kl(logits, student(tokens), 2.0)
    found = trained(tmp_path, tokens, student, temperature=2.0)
    assert found == pytest.approx(each[mask].mean(), rel=1e-5)


def spread(indices, values):
    """All log-probabilities, what is left spread evenly over what is not known."""
    result = np.empty((*indices.shape[:-1], VOCABULARY))
    for place in np.ndindex(indices.shape[:-1]):
        known = {int(i): v for i, v in zip(indices[place], values[place]) if i >= 0}
        left = max(1 - sum(map(np.exp, known.values())), 0) / max(VOCABULARY - len(known), 1)
        for c in range(VOCABULARY):
            result[place][c] = known.get(c, np.log(max(left, 1e-9)))
    return result


@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
@pytest.mark.parametrize("form", ["most probable", "any", "some unknown"])
def test_top_k_with_what_is_left_spread_evenly(k, form, tokens, logits, tmp_path):
    log_p = log_softmax(logits)
    order = np.argsort(-log_p, axis=-1)
    if form != "most probable":
        order = RNG.permuted(order, axis=-1)
    indices = order[..., :k]
    values = np.take_along_axis(log_p, indices, axis=-1)
    if form == "some unknown":
        indices = np.where(RNG.random(indices.shape) < 0.4, -1, indices)
        values = np.where(indices < 0, np.nan, values)
    mask = tokens != 0
    cache.write_answers(
        tmp_path, tokens, top_k=(indices, values), vocabulary=VOCABULARY, mask=mask, name="llm"
    )
    teacher = CachedTeacher(tmp_path)
    rows = np.array([3, 0, 19])
    found = np.array(teacher.answer(None, teacher.fetch(rows)).logits[0])
    expected = spread(indices, values)
    inside = mask[rows]
    np.testing.assert_allclose(found[inside], expected[rows][inside], rtol=1e-4, atol=1e-5)
    student = tokens_model()
    each = kl(expected, student(tokens), 1.0)
    found = trained(tmp_path, tokens, student)
    assert found == pytest.approx(each[mask].mean(), rel=1e-4)
    assert cache.verify(tmp_path, data=tokens).teacher["name"] == "llm"


def test_one_unit_several_labels_and_values(tmp_path):
    x = RNG.normal(size=(6, 3)).astype("float32")
    p = np.array([0.0, 0.2, 0.5, 0.9, 1.0, 0.7], "float32")
    one = cache.write_answers(tmp_path / "one", x, probabilities=p).layout.outputs[0]
    assert (one.shape, one.kind, one.binary) == ((1,), "sigmoid", True)
    found = Records(tmp_path / "one").read(np.arange(6))["logits_0"][:, 0]
    wide = p.astype("float64")
    expected = np.log(np.maximum(wide, 1.17549435e-38)) - np.log(np.maximum(1 - wide, 2.0**-24))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    flags = RNG.random((6, 4))
    made = cache.write_answers(tmp_path / "flags", x, probabilities=flags, binary=True)
    assert made.layout.outputs[0].binary
    values = cache.write_answers(tmp_path / "values", x, logits=x[:, 0], dtype="float16")
    assert values.record_bytes == 2


def test_a_killed_call_goes_on_and_other_answers_are_refused(tokens, logits, tmp_path):
    def write(answers, **options):
        return cache.write_answers(
            tmp_path, tokens, logits=answers, batch_size=5, shard_size=5, **options
        )

    def stop(done, total):
        if done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(logits, progress=stop)
    times = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("records-*.bin")}
    assert times
    with pytest.raises(ValueError, match="cache of another teacher, `answers`"):
        write(logits + 1e-3)
    assert write(logits).complete
    for name, time in times.items():
        assert (tmp_path / name).stat().st_mtime_ns == time
    assert write(logits).complete
    with pytest.raises(ValueError, match="another sample|not those of the cache"):
        CachedTeacher(tmp_path).join_fit(tokens[::-1].copy(), None, 4, {})


def test_a_dataset_of_another_length(tmp_path, logits):
    batches = ([np.zeros((5, 3), "float32")] for _ in range(5))
    with pytest.raises(ValueError, match="more than 20 rows"):
        cache.write_answers(tmp_path, ((x,) for (x,) in batches), logits=logits[:, 0])


def test_one_error_says_what_is_wrong(tmp_path, tokens, logits):
    log_p = log_softmax(logits)
    indices = np.argsort(-log_p, axis=-1)[..., :3]
    values = np.take_along_axis(log_p, indices, axis=-1)
    p = np.exp(log_p)

    def changed(array, value, place=(4, 1, 2)):
        array = array.copy()
        array[place] = value
        return array

    twice = changed(indices, indices[4, 1, 0])
    at = "row 4, position 1"
    top = {"vocabulary": VOCABULARY}
    for options, message in (
        ({}, "Received: none of them"),
        ({"logits": logits, "probabilities": p}, "Received: `logits` and `probabilities`"),
        ({"logits": logits[:-1]}, "20 rows of inputs and 19 rows of `logits`"),
        ({"logits": logits, "vocabulary": 12}, "has 11 classes on its last axis.*vocabulary=12"),
        ({"logits": p}, "look like probabilities"),
        ({"logits": changed(logits, np.nan)}, f"`logits` of {at} are NaN"),
        ({"probabilities": changed(p, 0.9)}, f"of {at} sum to .*, not to 1"),
        ({"probabilities": logits}, "below 0 or above 1.*`logits=`"),
        ({"probabilities": p[..., :5]}, r"row 0, position 0 and \d+ more rows sum to"),
        ({"top_k": (indices, values)}, "how many there are in all: `vocabulary"),
        ({"top_k": (indices, values), "vocabulary": 2}, "holds 3 classes.*vocabulary has 2"),
        ({"top_k": (indices, np.exp(values)), **top}, r"look like probabilities.*`np.log\(p\)`"),
        ({"top_k": (indices, changed(values, 0.3)), **top}, f"{at} are positive"),
        ({"top_k": (indices, values + 1.5), **top}, "positive|not normalized"),
        ({"top_k": (indices, np.minimum(values + 1, -0.3)), **top}, "not normalized"),
        ({"top_k": (changed(indices, 11), values), **top}, f"{at} name a class beyond .* of 11"),
        ({"top_k": (twice, values), **top}, f"{at} name a class twice"),
        ({"top_k": (indices, changed(values, np.nan)), **top}, f"{at} are NaN.*index -1"),
        ({"top_k": (indices[..., :2], values), **top}, "have one shape"),
        ({"top_k": (indices, values), "vocabulary": "all"}, "a positive integer"),
        ({"logits": logits, "mask": tokens[:, :2]}, r"one boolean for each position.*\(20, 4\)"),
        ({"logits": logits[:, 0], "mask": tokens[:, 0]}, "`sample_weight` 0"),
        ({"logits": 1e5 * logits, "dtype": "float16"}, 'dtype="float32"'),
        ({"logits": [[1.0], [1.0, 2.0]]}, "rows of several lengths"),
        ({"logits": 1e300 * logits.astype("float64")}, "larger than float32 holds. Scale"),
        ({"logits": np.ma.masked_greater(logits, 0)}, "what is masked is missing"),
        ({"top_k": (changed(indices, -2), values), **top}, f"{at} are below -1"),
        ({"top_k": (changed(indices.astype("u8"), 2**64 - 1), values), **top}, "class beyond"),
        (
            {"top_k": (np.argsort(-log_p, -1), -np.sort(-log_p, -1) - 1), **top},
            "are those of all 11 classes .* sum to 0.36.*, not to 1",
        ),
        ({"logits": logits, "mask": np.full(tokens.shape, np.nan)}, "`mask` holds True and False"),
        ({"logits": logits, "mask": np.full(tokens.shape, 0.5)}, "`mask` holds True and False"),
        ({"logits": logits, "mask": np.zeros(tokens.shape, bool)}, "False everywhere"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.write_answers(tmp_path / "cache", tokens, **options)
        assert not (tmp_path / "cache").exists()
    for options, message in (
        ({"top_k": (values, indices), **top}, "Swap them"),
        ({"top_k": values, **top}, "is a pair"),
        ({"logits": np.full((ROWS, 2), "no")}, "array of numbers"),
        ({"logits": logits, "name": 3}, "`name` is the name of the teacher"),
        ({"logits": logits, "binary": "yes"}, "`binary` is True, False or None"),
        ({"logits": logits, "progress": 3}, "`progress` is a function"),
    ):
        with pytest.raises(TypeError, match=message):
            cache.write_answers(tmp_path / "cache", tokens, **options)
    with pytest.raises(ValueError, match="path of a cache is empty"):
        cache.write_answers("", tokens, logits=logits)
    uneven = ({"a": tokens, "b": tokens[:7]} for _ in range(1))
    with pytest.raises(ValueError, match="7 and 20 rows"):
        cache.write_answers(tmp_path / "cache", uneven, logits=logits)
