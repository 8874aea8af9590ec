"""Joining answers, learning from them, and what noise costs, against NumPy and SciPy."""

import json
import math

import keras
import numpy as np
import pytest
import scipy.special
import scipy.stats

from keras_kd import federated
from keras_kd.federated import aggregation, ledger, methods, privacy

rng = np.random.default_rng(3)
ALL = np.ones((5, 4), bool)


def test_rules_are_those_of_scipy():
    answers = rng.normal(size=(5, 6, 4))
    for rule, wanted in (
        ("mean", answers.mean(0)),
        ("median", np.median(answers, 0)),
        ("trimmed", scipy.stats.trim_mean(answers, 0.2, axis=0)),
    ):
        found, known = aggregation.aggregate(answers, ALL, rule)
        np.testing.assert_allclose(found, wanted, err_msg=rule)
        assert known.all()


@pytest.mark.parametrize(("count", "left"), [(1, 1), (2, 2), (3, 1), (4, 2), (10, 6), (11, 7)])
def test_trimming_leaves_a_fifth_out_at_each_end(count, left):
    values = rng.permutation(np.arange(count, dtype=float))[:, None]
    cut = (count - left) // 2
    np.testing.assert_allclose(
        aggregation.trimmed(values), np.sort(values[:, 0])[cut : count - cut].mean()
    )


@pytest.mark.parametrize("rule", ["median", "trimmed"])
def test_one_liar_moves_no_robust_rule(rule):
    answers = np.tile([0.9, 0.1], (5, 3, 1)) + rng.uniform(-0.01, 0.01, (5, 3, 2))
    answers[2] = [-1e4, 1e4]
    found, _ = aggregation.aggregate(answers, np.ones((5, 2), bool), rule)
    np.testing.assert_allclose(found, np.tile([0.9, 0.1], (3, 1)), atol=0.02)


def test_a_class_is_joined_from_those_who_have_it():
    answers = rng.normal(size=(3, 2, 4))
    has = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]], bool)
    found, known = aggregation.aggregate(answers, has)
    np.testing.assert_array_equal(known, [True, True, True, False])
    np.testing.assert_allclose(found[:, 0], answers[:, :, 0].mean(0))
    np.testing.assert_allclose(found[:, 1], answers[0, :, 1])
    np.testing.assert_allclose(found[:, 2], answers[1, :, 2])
    assert not found[:, 3].any()


def test_entropy_reduction_is_a_softmax_of_probabilities():
    p = rng.dirichlet(np.ones(4), 5)
    found = federated.DSFL(era=0.1).consensus(p, np.ones(4, bool))
    np.testing.assert_allclose(found, scipy.special.softmax(p / 0.1, -1), rtol=1e-6)
    assert (scipy.stats.entropy(found, axis=-1) < scipy.stats.entropy(p, axis=-1)).all()
    # What masks have left is scaled to sum to 1 first; what nobody knows stays 0.
    known = np.array([1, 1, 1, 0], bool)
    found = federated.DSFL(era=0.5).consensus(2 * p, known)
    inner = p[:, :3] / p[:, :3].sum(-1, keepdims=True)
    np.testing.assert_allclose(found[:, :3], scipy.special.softmax(inner / 0.5, -1), rtol=1e-6)
    assert not found[:, 3].any()


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 1e-320])
def test_entropy_reduction_of_any_temperature_is_finite(temperature):
    shares = np.array([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]])
    found = aggregation.sharpened(shares, temperature)
    np.testing.assert_allclose(found, [[1, 0, 0], [0.5, 0.5, 0]], atol=1e-12)
    found = aggregation.sharpened(shares, temperature, np.array([False, True, True]))
    np.testing.assert_allclose(found, [[0, 1, 0], [0, 1, 0]], atol=1e-12)


def test_what_is_sent_is_logits_or_probabilities():
    z = rng.normal(size=(3, 4)).astype("float32")
    np.testing.assert_array_equal(federated.FedMD().answer(z), z)
    np.testing.assert_array_equal(federated.FedDF().answer(z), z)
    np.testing.assert_allclose(federated.DSFL().answer(z), scipy.special.softmax(z, -1), rtol=1e-6)


def test_losses_of_the_methods():
    z = rng.normal(size=(3, 4)).astype("float32")
    told = rng.normal(size=(3, 4)).astype("float32")
    known = np.array([1, 1, 0, 1], bool)
    method = federated.FedMD()
    targets = keras.ops.convert_to_tensor(method.targets(told, known))
    found = keras.ops.convert_to_numpy(method.loss()(targets, keras.ops.convert_to_tensor(z)))
    np.testing.assert_allclose(found, (np.abs(told - z) * known).mean(-1), rtol=1e-5)

    p = scipy.special.softmax(told, -1)
    for method, given, wanted in (
        (federated.DSFL(), p, p),
        (federated.FedDF(), told, scipy.special.softmax(np.where(known, told, -np.inf), -1)),
    ):
        targets = method.targets(given, known)
        np.testing.assert_allclose(targets, wanted, rtol=1e-5)
        loss = -(wanted * scipy.special.log_softmax(z, -1)).sum(-1).mean()
        np.testing.assert_allclose(float(method.loss()(targets, z)), loss, rtol=1e-5)


def test_a_client_learns_by_the_method_that_the_server_told():
    for method in (
        federated.FedMD(epochs=2, batch_size=7, learning_rate=0.01, pretrain=1),
        federated.DSFL(epochs=3),
        federated.FedDF(),
    ):
        there = methods.of_settings({**method.settings(), "round": 3})
        assert there.settings() == method.settings()
        assert type(there) is type(method)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: federated.DSFL(era=0), ValueError, "era"),
        (lambda: federated.DSFL(era=math.nan), ValueError, "era"),
        (lambda: federated.FedMD(epochs=0), ValueError, "epochs"),
        (lambda: federated.FedMD(pretrain=-1), ValueError, "pretrain"),
        (lambda: federated.FedDF(batch_size=2.5), TypeError, "batch_size"),
        (lambda: federated.Gaussian(0, 1e-5, 2), ValueError, "noise_multiplier"),
        (lambda: federated.Gaussian(-1.0, 1e-5, 2), ValueError, "noise_multiplier"),
        (lambda: federated.Gaussian(math.inf, 1e-5, 2), ValueError, "noise_multiplier"),
        (lambda: federated.Gaussian("1", 1e-5, 2), TypeError, "noise_multiplier"),
        (lambda: federated.Gaussian(1.0, 0.0, 2), ValueError, "delta"),
        (lambda: federated.Gaussian(1.0, 1.0, 2), ValueError, "delta"),
        (lambda: federated.Gaussian(1.0, 1e-5, 0), ValueError, "max_epsilon"),
    ],
)
def test_numbers_out_of_range_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


# ------------------------------------------------------------------------ privacy


def test_sensitivity_bounds_what_all_rows_of_a_client_can_move():
    p, q = (np.eye(4)[rng.integers(0, 4, 300)] for _ in range(2))
    worst = np.linalg.norm(np.eye(4)[[0] * 300] - np.eye(4)[[1] * 300])
    assert np.linalg.norm(p - q) <= privacy.sensitivity(300) == pytest.approx(worst)


def test_noise_has_the_stated_deviation():
    p = rng.dirichlet(np.ones(8), 5000)
    noise = privacy.noised(p, 0.3, np.random.default_rng(0)) - p
    wanted = 0.3 * math.sqrt(2 * 5000)
    # The standard deviation of 40,000 normal values is known to 0.35 %: five times that.
    assert noise.std() == pytest.approx(wanted, rel=0.018)
    assert abs(noise.mean()) < 5 * wanted / 200


@pytest.mark.parametrize("classes", [2, 5, 10])
@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0, 50.0])
def test_how_often_a_class_survives(classes, noise):
    draws = np.random.default_rng(1).normal(0, noise, (100_000, classes))
    draws[:, 0] += 1
    share = (draws.argmax(-1) == 0).mean()
    assert privacy.kept(noise, classes) == pytest.approx(share, abs=0.01)


def test_noise_that_drowns_the_answers_is_refused_with_the_arithmetic():
    noise = federated.Gaussian(10.0, 1e-5, 2.0)
    with pytest.raises(ValueError, match="drown") as error:
        privacy.require_audible(noise, 10, 5000, 10)
    # 10 * sqrt(2 * 5000) / sqrt(10)
    assert "1000" in str(error.value)
    assert "316.2" in str(error.value)
    # What it says is needed is enough, and one client fewer is not.
    needed = int(str(error.value).split("that needs ")[1].split(" clients")[0].replace(",", ""))
    privacy.require_audible(noise, needed, 5000, 10)
    with pytest.raises(ValueError, match="drown"):
        privacy.require_audible(noise, needed - 1, 5000, 10)
    # Few rows of many clients can be heard, and a median needs more of them than a mean.
    privacy.require_audible(noise, 10_000, 10, 10)
    most = privacy.tolerable(10)
    just = math.ceil(100 * 2 * 10 / most**2)
    privacy.require_audible(noise, just, 10, 10, "mean")
    with pytest.raises(ValueError, match="median"):
        privacy.require_audible(noise, just, 10, 10, "median")


@pytest.mark.parametrize("clients", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("rule", ["mean", "median", "trimmed"])
def test_how_much_noise_a_rule_leaves(rule, clients):
    drawn = np.random.default_rng(5).normal(size=(40_000, clients))
    joined = {
        "mean": drawn.mean(1),
        "median": np.median(drawn, 1),
        "trimmed": scipy.stats.trim_mean(drawn, 0.2 if clients > 4 else (clients > 2) * 0.34, 1),
    }[rule]
    left = joined.std() * math.sqrt(clients)
    assert privacy.varies(rule, clients) == pytest.approx(left, rel=0.02)


def exact_epsilon(noise_multiplier, releases, delta):
    """Of Gaussian noise, by Balle and Wang, 2018, theorem 8."""
    mu, norm = math.sqrt(releases) / noise_multiplier, scipy.stats.norm
    low, high = 0.0, 500.0
    for _ in range(100):
        e = (low + high) / 2
        spent = norm.cdf(mu / 2 - e / mu) - math.exp(e + norm.logcdf(-mu / 2 - e / mu))
        low, high = (e, high) if spent > delta else (low, e)
    return high


@pytest.mark.parametrize(("noise", "releases"), [(10.0, 10), (2.0, 1), (1.0, 4), (0.5, 20)])
def test_epsilon_is_a_tight_upper_bound(noise, releases):
    pytest.importorskip("dp_accounting")
    found = privacy.epsilon([noise] * releases, 1e-5)
    wanted = exact_epsilon(noise, releases, 1e-5)
    assert wanted <= found <= 1.3 * wanted
    # The classic conversion of Mironov, 2017, proposition 3, is an upper bound of it in turn.
    orders = np.arange(1.01, 200, 0.01)
    renyi = releases * orders / (2 * noise**2)
    assert found <= (renyi + math.log(1e5) / (orders - 1)).min() + 1e-6


def counted(multipliers, delta):
    """A stand-in where dp-accounting is missing: it grows with every release."""
    return sum(1 / z for z in multipliers)


def test_the_ledger_lasts_and_stops_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(privacy, "epsilon", counted)
    noise = federated.Gaussian(2.0, 1e-5, 1.4)
    assert ledger.Ledger(tmp_path).spend(noise, 10, 1, 1)
    assert ledger.Ledger(tmp_path).spend(noise, 10, 1, 2)
    kept = ledger.Ledger(tmp_path)
    assert [r["round"] for r in kept.releases] == [1, 2]
    assert kept.epsilon(1e-5) == pytest.approx(1.0)
    # A third one would cost 1.5: it is not noted either, and a weaker one still fits.
    assert not kept.spend(noise, 10, 2, 1)
    assert len(ledger.Ledger(tmp_path).releases) == 2
    assert ledger.Ledger(tmp_path).spend(federated.Gaussian(4.0, 1e-5, 1.4), 10, 2, 1)
    assert kept.releases[0]["sensitivity"] == pytest.approx(math.sqrt(20))
    assert [p.name for p in tmp_path.iterdir()] == [ledger.FILE]


def test_a_ledger_is_written_before_it_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(privacy, "epsilon", counted)
    noise = federated.Gaussian(2.0, 1e-5, 100.0)
    ledger.Ledger(tmp_path).spend(noise, 10, 1, 1)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("keras_kd.utils.files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        ledger.Ledger(tmp_path).spend(noise, 10, 1, 2)
    monkeypatch.undo()
    assert len(ledger.Ledger(tmp_path).releases) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"version": 9, "releases": []}',
        '{"version": 1, "releases": [{}]}',
        '{"version": 1, "releases": {}}',
        '{"version": 1, "releases": [{"noise_multiplier": 1.0, "epsilon": "x", "delta": 1}]}',
        # Each of these would have cost nothing.
        *(
            f'{{"version": 1, "releases": [{{"noise_multiplier": {value}}}]}}'
            for value in ("NaN", "Infinity", "0", "-1")
        ),
    ],
)
def test_a_damaged_ledger_is_no_empty_one(tmp_path, text):
    (tmp_path / ledger.FILE).write_text(text)
    with pytest.raises(ValueError, match="nobody knows"):
        ledger.Ledger(tmp_path)
    assert (tmp_path / ledger.FILE).read_text() == text


def test_rounds_beyond_the_limit_are_counted_before_the_first(monkeypatch):
    monkeypatch.setattr(privacy, "epsilon", counted)
    noise = federated.Gaussian(2.0, 1e-5, 1.4)
    assert privacy.require_affordable(noise, 2) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="2 rounds are within it"):
        privacy.require_affordable(noise, 7)
    with pytest.raises(ValueError, match="beside 1 releases before"):
        privacy.require_affordable(noise, 2, [2.0])


@pytest.mark.parametrize(
    "edit",
    [
        lambda r: r.pop(0),
        lambda r: r[0].update(noise_multiplier=200.0),
        lambda r: r[-1].update(noise_multiplier="200"),
    ],
)
def test_an_edited_ledger_is_told_of(tmp_path, monkeypatch, edit):
    monkeypatch.setattr(privacy, "epsilon", counted)
    noise = federated.Gaussian(2.0, 1e-5, 9.0)
    for number in range(3):
        ledger.Ledger(tmp_path).spend(noise, 10, 1, number)
    ledger.Ledger(tmp_path).require(1.5, 1e-5)
    path = tmp_path / ledger.FILE
    said = json.loads(path.read_text())
    edit(said["releases"])
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"holds . releases.*1.5 was spent: it was edited"):
        ledger.Ledger(tmp_path).require(0.0, 0.5)
    # What nobody can tell from the ledger itself, the state of the client tells.
    path.unlink()
    ledger.Ledger(tmp_path).require(0.0, 0.5)
    with pytest.raises(ValueError, match="holds 0 releases.*1.5 was spent"):
        ledger.Ledger(tmp_path).require(1.5, 1e-5)


def test_an_epsilon_that_is_no_number_is_beyond_every_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(privacy, "epsilon", lambda multipliers, delta: math.nan)
    assert not ledger.Ledger(tmp_path).spend(federated.Gaussian(1.0, 1e-5, 9.0), 10, 1, 1)


@pytest.mark.parametrize("noise", [1e9, 1e160, 1e300])
def test_any_noise_is_refused_with_words(noise):
    with pytest.raises(ValueError, match=r"that needs more than 10\^12 clients"):
        privacy.require_audible(federated.Gaussian(noise, 1e-5, 2.0), 3, 10, 4)


def test_a_ledger_is_json(tmp_path, monkeypatch):
    monkeypatch.setattr(privacy, "epsilon", counted)
    ledger.Ledger(tmp_path).spend(federated.Gaussian(2.0, 1e-5, 9.0), 10, 1, 1)
    said = json.loads((tmp_path / ledger.FILE).read_text())
    assert said["releases"][0]["noise_multiplier"] == 2.0
