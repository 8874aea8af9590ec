"""KerasHub tasks of small configurations and random weights, as teacher and student."""

import keras
import numpy as np
import pytest
from small_models import crossentropy, hard_loss, kl

import keras_kd as kd
from keras_kd.models import taps
from keras_kd.utils.masks import keras_mask

keras_hub = pytest.importorskip("keras_hub")
VOCABULARY, LENGTH, COUNT = 30, 8, 4


def spread(model):
    """Ten times the initial weights, so that the models disagree by more than rounding."""
    for variable in model.trainable_variables:
        if len(variable.shape) > 1:
            variable.assign(10 * variable)
    return model


def classifier(layers, width, name):
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=layers,
        num_heads=2,
        hidden_dim=width,
        intermediate_dim=2 * width,
        max_sequence_length=LENGTH,
        dropout=0.0,
    )
    return spread(
        keras_hub.models.BertTextClassifier(
            backbone, num_classes=3, preprocessor=None, dropout=0.0, name=name
        )
    )


def language_model(layers, width, name):
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=layers,
        num_heads=2,
        hidden_dim=width,
        intermediate_dim=2 * width,
        max_sequence_length=LENGTH,
        dropout=0.0,
    )
    return spread(keras_hub.models.GPT2CausalLM(backbone, preprocessor=None, name=name))


def tokens():
    rng = np.random.default_rng(0)
    mask = (np.arange(LENGTH) < np.array([8, 5, 3, 6])[:, None]).astype("int32")
    return {
        "token_ids": (rng.integers(1, VOCABULARY, (COUNT, LENGTH)) * mask).astype("int32"),
        "segment_ids": np.zeros((COUNT, LENGTH), "int32"),
        "padding_mask": mask,
    }


def relations(layer):
    return [f"backbone/{layer}/self_attention_layer:{kind}" for kind in ("query", "key", "value")]


def test_a_classifier_with_hidden_states_and_attention_relations():
    teacher, student = classifier(3, 16, "teacher"), classifier(2, 8, "student")
    x, y = tokens(), np.random.default_rng(1).integers(0, 3, COUNT)
    z_t, z_s = (model.predict(x, verbose=0) for model in (teacher, student))
    last, first = "transformer_layer_2", "transformer_layer_1"
    hidden = [
        np.asarray(
            keras.Model(model.backbone.inputs, model.backbone.get_layer(name).output).predict(
                x, verbose=0
            )
        )
        for model, name in ((teacher, last), (student, first))
    ]
    transfers = [
        kd.losses.SoftTargets(),
        kd.Transfer(
            kd.losses.HiddenState(), f"backbone/{last}", f"backbone/{first}", projector="linear"
        ),
        kd.Transfer(kd.losses.MiniLM(relation_heads=4), relations(last), relations(first)),
    ]
    distiller = kd.Distiller(student, teacher)
    distiller.compile(
        keras.optimizers.SGD(0.0), crossentropy(), distillation_loss=transfers, alpha=0.5
    )
    logs = distiller.fit(x, y, batch_size=COUNT, verbose=0).history
    np.testing.assert_allclose(logs["student_loss"][0], hard_loss(z_s, y).mean(), rtol=1e-5)
    np.testing.assert_allclose(logs["soft_targets"][0], kl(z_t, z_s, 1.0).mean(), rtol=1e-3)
    kernel, bias = (np.asarray(w) for w in transfers[1].projection.weights)
    # KerasHub's padding mask is an input like others, and no mask of Keras.
    gap = np.mean((hidden[1] @ kernel + bias - hidden[0]) ** 2)
    np.testing.assert_allclose(logs["hidden_state"][0], gap, rtol=1e-4)
    assert logs["minilm"][0] > 0


def encoder(name):
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, 8, mask_zero=True, name="words")(inputs)
    x = keras_hub.layers.TransformerEncoder(16, 2, name="encoder")(x)
    return spread(keras.Model(inputs, keras.layers.Dense(3)(x), name=name))


def test_the_padding_inside_the_blocks():
    """A mask that the block takes over from an embedding, or from an input of its own."""
    x = tokens()
    valid = x["padding_mask"] > 0
    teacher, student = encoder("teacher"), encoder("student")
    attention = "encoder/self_attention_layer"
    queries = []
    for model in (teacher, student):
        words = model.get_layer("words")(x["token_ids"])
        layer = taps.find(model, attention, "student").layer
        queries.append(np.array(layer.query_dense(words)))
    distiller = kd.Distiller(student, teacher)
    paths = [f"{attention}:query"] * 2
    distiller.compile(
        keras.optimizers.SGD(0.0), distillation_loss=kd.Transfer(kd.losses.Hint(), *paths)
    )
    logs = distiller.fit(x["token_ids"], batch_size=COUNT, verbose=0).history
    gap = ((queries[0] - queries[1]) ** 2).mean((2, 3))[valid].mean()
    np.testing.assert_allclose(logs["hint"][0], gap, rtol=1e-4)

    explicit = classifier(1, 8, "explicit")
    attention = "backbone/transformer_layer_0/self_attention_layer"
    found = {kind: taps.find(explicit, attention + kind, "student") for kind in ("", ":scores")}
    tensors = taps.read(explicit, x, found, False).tensors
    np.testing.assert_array_equal(np.array(keras_mask(tensors[""])), valid)
    np.testing.assert_array_equal(
        np.array(keras_mask(tensors[":scores"])),
        valid[:, None, :, None] & valid[:, None, None, :],
    )


def test_raw_text_through_the_preprocessor_of_the_task(tmp_path):
    tf = pytest.importorskip("tensorflow")
    pytest.importorskip("tensorflow_text")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, "the", "file", "is", "small", "fast", "wrong"]
    vocabulary = tmp_path / "vocabulary.txt"
    vocabulary.write_text("\n".join(words))
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(
        keras_hub.models.BertTokenizer(vocabulary=str(vocabulary)), sequence_length=LENGTH
    )
    teacher, student = classifier(2, 16, "teacher"), classifier(1, 8, "student")
    text, y = ["the file is small", "fast", "the file is wrong", "small is fast"], [0, 1, 2, 0]
    data = tf.data.Dataset.from_tensor_slices((text, y)).batch(2).map(preprocessor)
    before = student.get_weights()
    distiller = kd.Distiller(student, teacher)
    distiller.compile("adam", crossentropy(), metrics=["accuracy"])
    logs = distiller.fit(data, verbose=0).history
    assert np.isfinite(logs["loss"][0])
    assert 0 <= logs["accuracy"][0] <= 1
    assert any(np.abs(a - b).max() > 0 for a, b in zip(before, student.get_weights()))


def test_a_causal_language_model():
    teacher, student = language_model(2, 16, "teacher"), language_model(1, 8, "student")
    x = {name: value for name, value in tokens().items() if name != "segment_ids"}
    y = np.roll(x["token_ids"], -1, axis=1)
    # The last token of a sentence has no next one.
    weight = np.roll(x["padding_mask"], -1, axis=1).astype("float32")
    weight[:, -1] = 0
    z_t, z_s = (model.predict(x, verbose=0) for model in (teacher, student))
    distiller = kd.Distiller(student, teacher)
    distiller.compile(keras.optimizers.SGD(0.0), crossentropy(), alpha=0.5, temperature=2.0)
    logs = distiller.fit(x, y, sample_weight=weight, batch_size=COUNT, verbose=0).history
    hard = (weight * hard_loss(z_s, y)).sum() / weight.size
    soft = (weight * kl(z_t, z_s, 2.0)).sum() / weight.size
    np.testing.assert_allclose(logs["student_loss"][0], hard, rtol=1e-5)
    np.testing.assert_allclose(logs["distillation_loss"][0], soft, rtol=1e-3)
    np.testing.assert_allclose(logs["loss"][0], 0.5 * hard + 0.5 * soft, rtol=1e-4)
