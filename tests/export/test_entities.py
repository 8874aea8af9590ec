"""Whole entities: values by hand, and the conventions of seqeval (strict mode, IOB2)."""

import itertools

import numpy as np
import pytest

from keras_kd.export.report.scorecard import Scorecard
from keras_kd.export.verification import entities, lists, metrics, scores

TAGS = ["O", "B-PER", "I-PER", "B-MISC", "I-MISC"]


def numbers(*sentences, tags=TAGS):
    """Sentences as numbers of tags, filled up with -1."""
    rows = [[tags.index(tag) for tag in sentence.split()] for sentence in sentences]
    return np.array([list(row) for row in zip(*itertools.zip_longest(*rows, fillvalue=-1))])


def counted(truth, said, tags=TAGS):
    return entities.figures(truth, said, truth >= 0, tags)


def test_the_example_of_seqeval():
    # README of seqeval 1.2.2: MISC 0, PER 1, micro average 0.5.
    truth = numbers("O O O B-MISC I-MISC I-MISC O", "B-PER I-PER O")
    said = numbers("O O B-MISC I-MISC I-MISC I-MISC O", "B-PER I-PER O")
    found = counted(truth, said)
    assert found == {
        "entity_precision": 0.5,
        "entity_recall": 0.5,
        "entity_f1": 0.5,
        "per_entity": {
            "support": [1, 1],
            "precision": [1.0, 0.0],
            "recall": [1.0, 0.0],
            "f1": [1.0, 0.0],
        },
    }
    assert entities.types(TAGS) == ["PER", "MISC"]


@pytest.mark.parametrize(
    ("truth", "said", "right", "there", "answered"),
    [
        # Strict: what begins with I- is no entity (README of seqeval: 0.00 in strict mode).
        ("B-PER I-PER O", "I-PER I-PER O", 0, 1, 0),
        # Another type inside ends the entity, and begins none.
        ("B-PER I-PER O", "B-PER I-MISC O", 0, 1, 1),
        ("B-PER O O", "B-PER I-MISC O", 1, 1, 1),
        # Two beside each other are two, and one if the second tag goes on.
        ("B-PER B-PER O", "B-PER I-PER O", 0, 2, 1),
        ("B-PER B-PER O", "B-PER B-PER O", 2, 2, 2),
        # An end one too far or one too near is no hit, nor is another type.
        ("O B-PER I-PER", "O B-PER O", 0, 1, 1),
        ("O B-PER I-PER", "O B-MISC I-MISC", 0, 1, 1),
        # At the end of a sentence it ends.
        ("O O B-PER", "O O B-PER", 1, 1, 1),
    ],
)
def test_spans_by_hand(truth, said, right, there, answered):
    # The sentence behind begins with what could go on.
    found = counted(numbers(truth, "O O O"), numbers(said, "I-PER O O"))
    assert sum(found["per_entity"]["support"]) == there
    assert found["entity_recall"] == right / there
    assert found["entity_precision"] == (right / answered if answered else 0.0)
    assert found["entity_f1"] == pytest.approx(2 * right / (there + answered))


def test_tokens_without_a_label_are_left_out_of_their_sentence():
    # Pieces of words: the second of each has no label, and the entity goes on behind it.
    truth = np.array([[1, -1, 2, -1, 0]])
    said = np.array([[1, 0, 2, 3, 0]])
    assert counted(truth, said)["entity_f1"] == 1.0
    assert counted(truth[:, ::2], said[:, ::2])["entity_f1"] == 1.0
    nothing = counted(np.zeros((2, 3), int), np.zeros((2, 3), int))
    assert nothing["entity_f1"] is None
    assert nothing["per_entity"]["f1"] == [0.0, 0.0]


def test_only_tags_of_bio_make_entities():
    outputs = np.zeros((2, 3, 5), "float32")
    assert entities.tag_names(TAGS, outputs) == TAGS
    assert entities.tag_names(None, outputs) is None
    assert entities.tag_names(TAGS[:4], outputs) is None
    assert entities.tag_names(["O", "NOUN", "VERB", "B-", "X"], outputs) is None
    assert entities.tag_names(["O", "I-A", "I-B", "I-C", "I-D"], outputs) is None
    assert entities.tag_names(TAGS, outputs[:, 0]) is None


def test_the_figures_of_a_file_and_their_table():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (20, 6))
    outputs = rng.normal(size=(20, 6, 5)).astype("float32") + 3 * np.eye(5, dtype="f")[labels]
    kind = {"kind": "classes", "probabilities": False, "tags": TAGS}
    found = (
        metrics.compare({"y": outputs}, {"y": outputs}, {"y": labels}, {"y": kind}, scores=True)
        .outputs["y"]
        .scores
    )
    expected = entities.figures(labels, outputs.argmax(-1), labels >= 0, TAGS)
    assert {key: found[key] for key in expected} == expected
    assert set(scores.NAMES) >= {"entity_f1", "entity_precision", "entity_recall"}
    content = {
        "model": {"labels": TAGS, "outputs": [{"name": "y", "shape": [None, 6, 5]}]},
        "keras": {"outputs": {"y": {"scores": found}}},
        "evaluation": {"kinds": {"y": kind}, "labeled": True},
        "artifacts": [],
    }
    card = Scorecard(content, None)
    assert [row["entity"] for row in card.entities()] == ["PER", "MISC"]
    assert card.entities()[0]["f1"] == expected["per_entity"]["f1"][0]
    assert card.rows()[0]["entity_f1"] == expected["entity_f1"]
    text = "\n".join(card.table(100))
    assert "entities of the Keras model" in text
    assert "entity F1" in text
    # Where there is no room, the figure that was asked for stays.
    narrow = "\n".join(card.table(70)).split("Not shown")
    assert "entity F1" in narrow[0]
    assert "entity recall" in narrow[1]
    content["evaluation"]["metrics"] = {"y": [["entity_recall", "max"]]}
    assert "entity recall" in "\n".join(Scorecard(content, None).table(50)).split("Not shown")[0]


def test_lists_of_items_by_scikit_learn():
    from sklearn.metrics import ndcg_score

    rng = np.random.default_rng(1)
    groups = rng.integers(0, 12, 90)
    groups[0], groups[1:] = 12, groups[1:]
    gains, scored = rng.integers(0, 4, 90), rng.normal(size=(90, 1))
    gains[groups == 3] = 0
    scored[:40] = np.round(scored[:40])
    each = [
        ndcg_score(gains[None, groups == g], scored[None, groups == g, 0], k=10)
        for g in range(12)
        if (groups == g).sum() > 1
    ]
    assert lists.ndcg(scored, gains[:, None], groups) == pytest.approx(np.mean(each), 1e-12)
    assert lists.ndcg(scored[:2], gains[:2], np.array([0, 1])) is None
