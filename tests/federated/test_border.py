"""What may cross, and what is wrong with answers that may."""

import io

import numpy as np
import pytest

from keras_kd.federated import border
from keras_kd.federated.border import BorderError, Packet

rng = np.random.default_rng(2)
ROWS = np.arange(6, dtype="int32")
P = rng.dirichlet(np.ones(4), 6).astype("float16")
SIZES = {"queries": 6, "classes": 4}


def answers(**changed):
    arrays = {"rows": ROWS, "answers": P, **changed}
    return Packet("answers", {k: v for k, v in arrays.items() if v is not None}, {"round": 1})


def greeting(**arrays):
    order = np.arange(4, dtype="int32")
    numbers = {"number": 0, "inputs": [3], "public": 1}
    return Packet("hello", {"order": order, **arrays}, numbers)


def test_what_is_on_the_list_may_cross():
    border.check(greeting(has=np.array([1, 0, 0, 1], "uint8")), border.UP, {})
    packet = answers()
    assert border.check(packet, border.UP, SIZES) is packet


@pytest.mark.parametrize(
    ("packet", "match"),
    [
        (Packet("weights", {"kernel": P}, {}), "kind 'weights'"),
        (answers(kernel=P), "`kernel` may not cross"),
        (answers(answers=P.astype("float32")), "is float16"),
        (answers(answers=P[:, :3]), "shape"),
        (answers(answers=P[:5]), "shape"),
        (answers(answers=P[..., None]), "shape"),
        (answers(answers=[[0.1] * 4] * 6), "Received: list"),
        (answers(answers=np.array([["a"] * 4] * 6, object)), "float16"),
        (answers(rows=ROWS.astype("int64")), "is int32"),
        (answers(rows=None), "lacks `rows`"),
        (Packet("answers", {"rows": ROWS, "answers": P}, {}), "lacks `round`"),
        (Packet("answers", {"rows": ROWS, "answers": P}, {"round": 1.0}), "`round` may not"),
        (Packet("answers", {"rows": ROWS, "answers": P}, {"round": 1, "y": 3}), "`y` may not"),
        (Packet("failed", {}, {"round": 1, "error": "patient 3 has"}), "`error` may not"),
        (Packet("failed", {}, {"round": 1, "error": b"x"}), "`error` may not"),
        (Packet("report", {}, {"round": 1, "after": float("nan")}), "`after` may not"),
        (Packet("report", {}, {"round": 1, "after": 1.5}), "`after` may not"),
        (Packet("report", {}, {"round": 1, "alone": float("inf")}), "`alone` may not"),
        (Packet("report", {}, {"round": 1, "epsilon": -3.0}), "`epsilon` may not"),
        (Packet("spent", {}, {"round": 1, "epsilon": -0.5}), "`epsilon` may not"),
        (Packet("report", {}, {"round": 2**40}), "`round` may not"),
        (Packet("hello", {}, {"number": -5, "inputs": [1], "public": 1}), "`number` may not"),
        (Packet("hello", {}, {"number": 0, "inputs": [1] * 99, "public": 1}), "`inputs`"),
        (Packet("hello", {}, {"number": 0, "inputs": [10**400], "public": 1}), "`inputs`"),
        (Packet("hello", {}, {"number": 0, "inputs": [1], "public": 7}), "`public` may not"),
        (Packet("report", {}, {"round": 1, "kept": 10**50}), "`kept` may not"),
        (Packet("spent", {}, {"round": 1, "epsilon": float("inf")}), "`epsilon` may not"),
        (greeting(has=np.full(4, 37, "uint8")), "`has` in `hello` holds values beyond 0 to 1"),
        (answers(answers=P.astype(np.dtype("float16", metadata={"flu": 1}))), "metadata"),
        (answers(answers={"a": P}), "Received: dict"),
        (Packet(["answers"], {}, {}), "without a name"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(packet, match):
    with pytest.raises(BorderError, match=match):
        border.check(packet, border.UP, SIZES)


@pytest.mark.parametrize("name", ["patient 17 has flu", "\x1b[31mred", "x" * 100_000, 5])
def test_names_that_could_hold_data_are_not_repeated(name):
    for packet in (
        answers(**{"rows": ROWS} | {name: P}) if isinstance(name, str) else Packet(name),
        Packet("answers", {"rows": ROWS, "answers": P}, {"round": 1, name: 1}),
        Packet(name, {}, {}),
    ):
        with pytest.raises(BorderError) as error:
            border.check(packet, border.UP, SIZES)
        assert str(name) not in str(error.value) or name == 5
        assert len(str(error.value)) < 200
        assert packet.nbytes > 0


def test_bytes_of_what_may_not_cross_are_counted():
    assert Packet("answers", {}, {"secret": b"x" * 99}).nbytes > 99
    assert answers(answers=[[0.5, 0.5]] * 50).nbytes > 500


def test_the_name_of_an_error_crosses_if_it_is_a_word():
    class PatientMüllerError(ValueError):
        pass

    assert border.word_of(PatientMüllerError("17")) == "ValueError"
    assert border.word_of(SystemExit(3)) == "SystemExit"


def test_what_is_told_comes_whole():
    settings = {
        "run": 1, "round": 2, "number": 0, "seed": 0, "method": "dsfl", "epochs": 1,
        "batch_size": 8, "learning_rate": 0.1,
    }  # fmt: skip
    told = {"told_rows": ROWS, "told": P, "known": np.ones(4, "uint8")}
    border.check(Packet("finish", told, settings), border.DOWN, {})
    border.check(Packet("finish", {}, settings), border.DOWN, {})
    with pytest.raises(BorderError, match="together"):
        border.check(Packet("finish", {"told": P}, settings), border.DOWN, {})
    with pytest.raises(BorderError, match="shape"):
        known = {**told, "known": np.ones(5, "uint8")}
        border.check(Packet("finish", known, settings), border.DOWN, {})
    with pytest.raises(BorderError, match="shape"):
        border.check(Packet("finish", {**told, "told_rows": ROWS[:3]}, settings), border.DOWN, {})


def test_bytes_are_those_of_npy_files():
    packet = answers()
    written = 0
    for array in packet.arrays.values():
        file = io.BytesIO()
        np.save(file, array)
        written += len(file.getvalue())
    assert packet.nbytes == written + len('{"kind":"answers","round":1}')


def nan(p):
    p[1, 2] = np.nan
    return p


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: p, None),
        (nan, "not finite: 1 of 6"),
        (lambda p: p * np.inf, "not finite: 6 of 6"),
        (lambda p: np.full_like(p, 0.25), "constant"),
        (lambda p: np.tile(p[:1], (6, 1)), "constant"),
        (lambda p: p * 2, "no probabilities"),
        (lambda p: p - 0.3, "no probabilities"),
        (lambda p: np.zeros_like(p), "no probabilities"),
    ],
)
def test_lies_that_have_the_right_shape(change, match):
    found = border.problem(change(P.copy()), True, False)
    assert found is None if match is None else match in found


def test_logits_and_noise_are_held_to_less():
    z = rng.normal(size=(6, 4)).astype("float16")
    assert border.problem(z, False, False) is None
    assert "constant" in border.problem(np.tile(z[:1], (6, 1)), False, False)
    # With noise, values are no probabilities any more.
    assert border.problem(z, True, True) is None
    assert "finite" in border.problem(z * np.inf, True, True)
    # One row alone cannot be constant.
    assert border.problem(P[:1], True, False) is None
