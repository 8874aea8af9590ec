"""Token classifiers and causal language models: padded tokens count for nothing, against NumPy."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from small_models import crossentropy, hard_loss, kl, log_softmax

import keras_kd as kd
from keras_kd.distill import batch

VOCABULARY, TAGS, LENGTH, COUNT = 9, 4, 6, 5


def _tagger(width, name, mask_zero=True):
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(VOCABULARY, width, mask_zero=mask_zero)(inputs)
    x = layers.Dense(width, activation="tanh")(x)
    return keras.Model(inputs, layers.Dense(TAGS)(x), name=name)


def _taggers(**options):
    return _tagger(4, "student", **options), _tagger(7, "teacher", **options)


def _padded(classes=TAGS):
    """Sentences of different lengths, with zeros behind them, and a label for every place."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCABULARY, (COUNT, LENGTH))
    valid = np.arange(LENGTH) < np.array([6, 4, 1, 3, 5])[:, None]
    return np.where(valid, tokens, 0), rng.integers(0, classes, (COUNT, LENGTH)), valid


def _logits(student, teacher, x):
    return teacher.predict(x, verbose=0), student.predict(x, verbose=0)


def _fit(student, teacher, *data, **options):
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.01), crossentropy(), alpha=0.4, temperature=2.0, **options
    )
    return distiller.fit(*data, batch_size=COUNT, verbose=0).history


def _expect(logs, z_t, z_s, y, weight, divisor):
    """The logs of one step that weighs every token."""
    hard = (weight * hard_loss(z_s, y)).sum() / divisor
    soft = (weight * kl(z_t, z_s, 2.0)).sum() / divisor
    np.testing.assert_allclose(logs["student_loss"][0], hard, rtol=1e-5)
    np.testing.assert_allclose(logs["distillation_loss"][0], soft, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logs["loss"][0], 0.4 * hard + 0.6 * soft, rtol=1e-5)


def test_the_mask_of_an_embedding():
    student, teacher = _taggers()
    x, y, valid = _padded()
    z_t, z_s = _logits(student, teacher, x)
    logs = _fit(student, teacher, x, y, metrics=["accuracy"])
    _expect(logs, z_t, z_s, y, valid, valid.sum())
    same = z_t.argmax(-1) == z_s.argmax(-1)
    np.testing.assert_allclose(logs["agreement"][0], same[valid].mean(), rtol=1e-6)
    right = z_s.argmax(-1) == y
    np.testing.assert_allclose(logs["accuracy"][0], right[valid].mean(), rtol=1e-6)


def test_what_stands_in_the_padding_changes_nothing():
    """Other labels there: the student takes the very same step."""
    x, y, valid = _padded()
    found = []
    for labels in (y, np.where(valid, y, TAGS - 1 - y)):
        keras.utils.set_random_seed(3)
        student, teacher = _taggers()
        _fit(student, teacher, x, labels)
        found.append(student.get_weights())
    for one, other in zip(*found):
        np.testing.assert_array_equal(one, other)


def test_a_weight_for_every_token():
    student, teacher = _taggers(mask_zero=False)
    x, y, valid = _padded()
    weight = (valid * np.random.default_rng(2).uniform(0.5, 2, valid.shape)).astype("float32")
    z_t, z_s = _logits(student, teacher, x)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.01),
        crossentropy(),
        weighted_metrics=["accuracy"],
        alpha=0.4,
        temperature=2.0,
    )
    logs = distiller.fit(x, y, sample_weight=weight, batch_size=COUNT, verbose=0).history
    _expect(logs, z_t, z_s, y, weight, valid.size)
    right = z_s.argmax(-1) == y
    np.testing.assert_allclose(
        logs["accuracy"][0], (weight * right).sum() / weight.sum(), rtol=1e-5
    )


@pytest.mark.parametrize("masked", [False, True])
def test_a_weight_for_every_sentence(masked):
    """Keras alone would multiply the tokens of all sentences by it, or fail."""
    student, teacher = _taggers(mask_zero=masked)
    x, y, valid = _padded()
    weight = np.random.default_rng(2).uniform(0.5, 2, COUNT).astype("float32")
    z_t, z_s = _logits(student, teacher, x)
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), crossentropy(), alpha=0.4, temperature=2.0)
    logs = distiller.fit(x, y, sample_weight=weight, batch_size=COUNT, verbose=0).history
    counted = valid if masked else np.ones_like(valid)
    _expect(logs, z_t, z_s, y, counted * weight[:, None], counted.sum())


def test_weights_by_output_are_spread_over_the_tokens_of_theirs():
    weights = {"tags": ops.ones((3,)), "topic": ops.ones((3,))}
    outputs = {"tags": ops.ones((3, 5, 2)), "topic": ops.ones((3, 2))}
    fitted = batch.for_positions(weights, outputs)
    assert {name: tuple(w.shape) for name, w in fitted.items()} == {"tags": (3, 5), "topic": (3,)}
    one = ops.ones((3,))
    assert batch.for_positions(one, outputs) is one
    assert batch.for_positions(None, outputs) is None


def test_batches_of_different_lengths():
    """Each padded to its longest sentence, as `ragged.to_tensor()` or `padded_batch` do."""
    tf = pytest.importorskip("tensorflow")
    x, y, valid = _padded()
    student, teacher = _taggers()
    z_t, z_s = _logits(student, teacher, x)
    lengths = valid.sum(1)
    data = tf.data.Dataset.from_generator(
        lambda: ((x[i, :n], y[i, :n]) for i, n in enumerate(lengths)),
        output_signature=(
            tf.TensorSpec((None,), tf.int32),
            tf.TensorSpec((None,), tf.int32),
        ),
    )
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), crossentropy(), alpha=0.4, temperature=2.0)
    logs = distiller.fit(data.padded_batch(2), verbose=0).history
    groups = [slice(0, 2), slice(2, 4), slice(4, 5)]
    # The logs are means over the samples of the mean over the tokens of their batch.
    soft = sum(kl(z_t[g], z_s[g], 2.0)[valid[g]].mean() * len(z_t[g]) for g in groups) / COUNT
    np.testing.assert_allclose(logs["distillation_loss"][0], soft, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["tensors", "dataset"])
def test_ragged_batches_are_refused_with_the_way_to_pad_them(form):
    tf = pytest.importorskip("tensorflow")
    x = tf.ragged.constant([[1, 2, 3], [4], [5, 6]], dtype=tf.int32)
    y = tf.ragged.constant([[1, 2, 0], [1], [1, 0]], dtype=tf.int32)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(3)
    given = (x, y) if form == "tensors" else (batches,)
    student, teacher = _taggers()
    before = student.get_weights()
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", crossentropy())
    with pytest.raises(ValueError, match="ragged tensors.*to_tensor"):
        distiller.fit(*given, verbose=0)
    # And what the message advises trains.
    padded = batches.map(lambda x, y: (x.to_tensor(), y.to_tensor()))
    distiller.fit(padded, verbose=0)
    assert any(np.abs(a - b).max() > 0 for a, b in zip(before, student.get_weights()))


def _language_model(width, name):
    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(VOCABULARY, width, mask_zero=True)(tokens)
    attended = layers.MultiHeadAttention(2, width // 2)(x, x, use_causal_mask=True)
    x = layers.LayerNormalization()(layers.Add()([x, attended]))
    return keras.Model(tokens, layers.Dense(VOCABULARY)(x), name=name)


def test_a_causal_language_model_learns_the_next_token():
    student, teacher = _language_model(4, "student"), _language_model(8, "teacher")
    sentences, _, _ = _padded()
    x, y = sentences[:, :-1], sentences[:, 1:]
    z_t, z_s = _logits(student, teacher, x)
    # Keras's `Add` drops the mask of an embedding, and the last token of a sentence is followed by
    # padding, which is no word to learn: so the tokens are weighed.
    weight = (y > 0).astype("float32")
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), crossentropy(), alpha=0.4, temperature=2.0)
    logs = distiller.fit(x, y, sample_weight=weight, batch_size=COUNT, verbose=0).history
    _expect(logs, z_t, z_s, y, weight, y.size)
    # Neither model looks ahead, so what comes later moves no earlier logits.
    later = x.copy()
    later[0, -1] = 1 + later[0, -1] % (VOCABULARY - 1)
    np.testing.assert_allclose(student.predict(later, verbose=0)[0, :-1], z_s[0, :-1], atol=1e-6)


def _attending(width, name):
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(VOCABULARY, width, mask_zero=True, name="words")(inputs)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    model = keras.Model(inputs, layers.Dense(TAGS)(x), name=name)
    # Wide enough apart that scores and relations differ by more than rounding.
    model.get_layer("words").set_weights([np.random.default_rng(width).normal(size=(9, width))])
    return model


def _log_relations(states, valid):
    products = np.einsum("bqhd,bkhd->bhqk", states, states) / np.sqrt(states.shape[-1])
    return log_softmax(np.where(valid[:, None, None, :], products, -np.inf))


def test_padding_counts_for_nothing_inside_attention():
    student, teacher = _attending(5, "student"), _attending(7, "teacher")
    x, _, valid = _padded()
    query, key, words = [], [], []
    for model in (teacher, student):
        words.append(np.array(model.get_layer("words")(x)))
        layer = model.get_layer("attention")
        query.append(np.array(layer.query_dense(words[-1])))
        key.append(np.array(layer.key_dense(words[-1])))
    scores = [np.einsum("bqhd,bkhd->bhqk", q, k) / 2 for q, k in zip(query, key)]
    gap = ((scores[0] - scores[1]) ** 2).mean(1)
    by_query = (gap * valid[:, None, :]).sum(-1) / valid.sum(-1)[:, None]
    log_p, log_q = (_log_relations(states, valid) for states in query)
    terms = np.where(valid[:, None, None, :], np.exp(log_p) * (log_p - log_q), 0)
    relations = terms.sum(-1).mean(1)
    pairs = (valid[:, None, :, None] & valid[:, None, None, :]) * np.ones((1, 2, 1, 1))
    entries = (scores[0] - scores[1]) ** 2 * pairs
    attends, asks = ("attention:scores",) * 2, ("attention:query",) * 2
    transfers = {
        "scores": kd.Transfer(kd.losses.AttentionScores(), *attends),
        "relations": kd.Transfer(kd.losses.MiniLM(relation_heads=2), *asks),
        "queries": kd.Transfer(kd.losses.Hint(), *asks),
        "plain": kd.Transfer(keras.losses.MeanSquaredError(), *attends),
        "function": kd.Transfer(lambda t, s: ops.mean((t - s) ** 2, axis=(1, 2, 3)), *attends),
        "words": kd.Transfer(kd.losses.PKT(), "words", "words"),
    }
    for name, transfer in transfers.items():
        transfer.name = name
    expected = {
        "scores": by_query[valid].mean(),
        "relations": relations[valid].mean(),
        "queries": ((query[0] - query[1]) ** 2).mean((2, 3))[valid].mean(),
        # A loss of Keras, or of the user, reads zeros in place of padding.
        "plain": entries.mean(),
        "function": entries.mean(),
        "words": pkt(*(side * valid[..., None] for side in words)).mean(),
    }
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), distillation_loss=list(transfers.values()))
    logs = distiller.fit(x, batch_size=COUNT, verbose=0).history
    for name, value in expected.items():
        np.testing.assert_allclose(logs[name][0], value, rtol=1e-4, err_msg=name)


def pkt(teacher, student):
    """Probabilities with which samples are neighbors, in NumPy."""

    def neighbors(features):
        flat = features.reshape(len(features), -1)
        direction = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
        likeness = (direction @ direction.T + 1) / 2
        return likeness / likeness.sum(-1, keepdims=True)

    p, q = neighbors(teacher), neighbors(student)
    return (p * (np.log(p + 1e-7) - np.log(q + 1e-7))).mean(-1)
