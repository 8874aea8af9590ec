"""Figures of ranking, tokens and several labels in the scores, the tables and the browser."""

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from keras_kd.export.verification import scores
from keras_kd.export.verification.benchmark import BenchReport


@pytest.fixture
def lists():
    generator = np.random.default_rng(3)
    return generator.normal(size=(40, 15)).astype("float32"), generator.integers(0, 15, 40)


def test_ndcg_of_the_right_class_among_the_others(lists):
    outputs, right = lists
    one_hot = np.eye(15)[right]
    expected = ndcg_score(one_hot, outputs, k=10)
    # By hand: one gain at the rank of the right class, where that is among the first ten.
    ranks = 1 + (outputs > outputs[np.arange(40), right][:, None]).sum(axis=1)
    by_hand = np.mean(np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0))
    assert expected == pytest.approx(by_hand)
    for labels in (right, one_hot):
        found = scores.scores(outputs, labels, "classes", False, ranks=True)
        assert found["ndcg@10"] == pytest.approx(expected)
    assert "ndcg@10" not in scores.scores(outputs, right, "classes", False)


def test_ndcg_leaves_out_rows_without_label_or_weight(lists):
    outputs, right = lists
    some = np.where(np.arange(40) % 3, right, -1)
    kept = some >= 0
    expected = ndcg_score(np.eye(15)[right[kept]], outputs[kept], k=10)
    found = scores.scores(outputs, some, "classes", False, ranks=True)
    assert found["ndcg@10"] == pytest.approx(expected)
    weights = np.arange(40.0)
    found = scores.scores(outputs, right, "classes", False, weights, ranks=True)
    assert found["ndcg@10"] == pytest.approx(
        ndcg_score(np.eye(15)[right[1:]], outputs[1:], k=10, sample_weight=weights[1:])
    )


def bench_row(score):
    keys = ("bytes", "p50_ms", "p90_ms", "cold_start_ms", "warm_start_ms", "peak_memory_bytes")
    return {"name": "onnx int8", **dict.fromkeys(keys, 5.0), "score": score, "error": None}


@pytest.mark.parametrize("width", [60, 80, 160])
@pytest.mark.parametrize(
    ("metric", "score", "said"),
    [
        ("accuracy", 0.9769, "acc"),
        ("ndcg@10", 0.8123, "NDCG@10"),
        ("macro_f1", None, "macro F1"),
        (None, None, "memory"),
    ],
)
def test_bench_says_what_files_are_judged_by(width, metric, score, said):
    report = BenchReport([bench_row(score)], 1, metric)
    lines = report.table(width).splitlines()
    assert max(map(len, lines)) <= width
    # What no row has is left out first.
    assert said in lines[0] or (score is None and width < 100)
    if score is not None:
        assert {"accuracy": "97.69", "ndcg@10": "0.8123"}[metric] in lines[1]
    if metric is not None:
        assert "as measured at the export" in lines[-1]
    assert report.to_dict()["metric"] == metric
