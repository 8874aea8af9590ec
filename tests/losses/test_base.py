"""What every loss inherits: context, labels, masks, weights, copies."""

import copy

import keras
import numpy as np
import pytest
from keras import ops

from keras_kd import losses
from keras_kd.losses.counts import joint_mask
from keras_kd.utils.masks import with_keras_mask

TEACHER = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.5]])
STUDENT = np.array([[1.0, 0.5, 0.0], [1.0, 1.0, -2.0]])


def value(tensor):
    return ops.convert_to_numpy(tensor)


class Scale(losses.DistillationLoss):
    """The difference times the temperature: shows which temperature is in force."""

    def call(self, y_true, y_pred):
        return ops.mean(y_pred - y_true, axis=-1) * self.temperature


def test_plain_numbers_and_arrays_are_one_tensor():
    loss = losses.LogitMSE()
    assert float(loss([[2.0, 0.0]], [[1.0, 0.0]])) == 0.5
    assert float(loss(np.array([[2, 0]]), np.array([[1, 0]]))) == 0.5
    fsp = losses.FSP(reduction=None)
    ones = np.ones((3, 2, 2, 1))
    assert fsp([ones, ones], (2 * ones, ones)).shape == (3,)


def test_own_temperature_goes_before_the_given_one():
    ones, zeros = np.ones((2, 3)), np.zeros((2, 3))
    assert float(Scale()(zeros, ones)) == 1.0
    assert float(Scale()(zeros, ones, temperature=4.0)) == 4.0
    assert float(Scale(temperature=3.0)(zeros, ones, temperature=4.0)) == 3.0


def test_a_live_temperature_is_followed_without_a_new_loss():
    live = keras.Variable(2.0, trainable=False)
    loss = Scale()
    assert float(loss(np.zeros((2, 3)), np.ones((2, 3)), temperature=live)) == 2.0
    live.assign(5.0)
    assert float(loss(np.zeros((2, 3)), np.ones((2, 3)), temperature=live)) == 5.0
    assert loss.temperature is None


def test_adaptive_temperature_follows_the_given_one():
    loss = losses.SoftTargets(losses.FLSW(), dtype="float64")
    fixed = losses.SoftTargets(losses.FLSW(base=4.0), dtype="float64")
    followed = float(loss(TEACHER, STUDENT, temperature=4.0))
    assert followed == float(fixed(TEACHER, STUDENT, temperature=1.0))
    assert followed != float(loss(TEACHER, STUDENT))


def test_adaptive_temperature_never_falls_below_its_minimum():
    """The published rule turns negative where one sample is far harder than the others."""
    student = np.zeros((4, 100), "float32")
    student[1:, 0] = 50.0
    temperature = losses.CWSM(base=1.0, minimum=0.5)(student, student)
    assert temperature.shape == (4, 1)
    assert value(temperature).min() == 0.5
    for wrong in ({"base": -1.0}, {"beta": -1.0}, {"minimum": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            losses.CWSM(**wrong)
    with pytest.raises(ValueError, match="gamma"):
        losses.FLSW(gamma=0.0)


def test_adaptive_temperature_survives_saving():
    loss = losses.DecoupledKD(temperature=losses.FLSW(base=3.0, beta=0.5, gamma=1.0))
    copied = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert isinstance(copied.temperature, losses.FLSW)
    assert copied.temperature.get_config() == loss.temperature.get_config()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        losses.SoftTargets(temperature=temperature)


def test_bound_gives_the_values_alone():
    values = (
        losses.SoftTargets()
        .bound(temperature=2.0)
        .call(ops.convert_to_tensor(TEACHER), ops.convert_to_tensor(STUDENT))
    )
    loss = losses.SoftTargets(temperature=2.0, reduction=None, dtype="float64")
    np.testing.assert_allclose(value(values), value(loss(TEACHER, STUDENT)))


def test_missing_labels_are_named():
    with pytest.raises(ValueError, match="labels"):
        losses.DecoupledKD()(TEACHER, STUDENT)


@pytest.mark.parametrize("labels", [[0, 1], [[0], [1]], [[1, 0, 0], [0, 1, 0]]])
def test_labels_as_numbers_columns_or_one_hot(labels):
    loss = losses.DecoupledKD(dtype="float64")
    expected = float(loss(TEACHER, STUDENT, labels=[0, 1]))
    assert float(loss(TEACHER, STUDENT, labels=np.array(labels))) == expected


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"one class number or one-hot row"):
        losses.DecoupledKD()(TEACHER, STUDENT, labels=np.zeros((2, 5)))


def test_classes_must_agree():
    with pytest.raises(ValueError, match="same number of classes"):
        losses.SoftTargets()(TEACHER, STUDENT[:, :2])
    with pytest.raises(ValueError, match="at least two classes"):
        losses.DIST()(TEACHER[:, :1], STUDENT[:, :1])
    with pytest.raises(ValueError, match="cannot standardize one class"):
        losses.LogitMSE(standardize=True)(TEACHER[:, :1], STUDENT[:, :1])


def test_one_unit_outputs_distil_through_binary_soft_targets():
    loss = losses.BinarySoftTargets(dtype="float64")
    p, q = 1 / (1 + np.exp(-TEACHER[:, :1])), 1 / (1 + np.exp(-STUDENT[:, :1]))
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    np.testing.assert_allclose(float(loss(TEACHER[:, :1], STUDENT[:, :1])), expected, rtol=1e-6)


def test_keras_masks_of_both_sides_are_joined():
    teacher, student = np.zeros((2, 3, 1), "float32"), np.ones((2, 3, 1), "float32")
    first = ops.convert_to_tensor([[True, True, False], [True, True, True]])
    second = ops.convert_to_tensor([[True, False, True], [True, True, True]])
    teacher = with_keras_mask(ops.convert_to_tensor(teacher), first)
    student = with_keras_mask(ops.convert_to_tensor(student), second)
    assert value(joint_mask(teacher, student)).sum() == 4
    student = student * np.array([[[1.0], [9.0], [9.0]], [[1.0], [1.0], [1.0]]], "float32")
    student = with_keras_mask(student, second)
    assert float(losses.Hint()(teacher, student)) == 1.0


def test_masked_values_and_weights_of_every_rank():
    teacher, student = np.zeros((2, 3, 4)), np.ones((2, 3, 4)) * np.arange(3)[None, :, None]
    loss = losses.Hint(dtype="float64")
    per_sample = float(loss(teacher, student, sample_weight=np.array([1.0, 3.0])))
    assert per_sample == pytest.approx((5 + 3 * 5) / 6)
    column = float(loss(teacher, student, sample_weight=np.array([[1.0], [3.0]])))
    assert column == per_sample
    tokens = float(loss(teacher, student, sample_weight=np.array([[1.0, 1, 0], [0, 1, 1]])))
    assert tokens == pytest.approx((0 + 1 + 0 + 0 + 1 + 4) / 6)
    mean = losses.Hint(dtype="float64", reduction="mean_with_sample_weight")
    weighted = float(mean(teacher, student, sample_weight=np.array([1.0, 3.0])))
    assert weighted == pytest.approx(20 / 12)
    mask = np.array([[True, True, False], [True, False, False]])
    assert float(mean(teacher, student, mask=mask)) == pytest.approx(1 / 3)
    total = losses.Hint(dtype="float64", reduction="sum")
    assert float(total(teacher, student, mask=mask)) == 1.0


def test_weights_that_do_not_fit_are_refused():
    loss = losses.SoftTargets()
    with pytest.raises(ValueError, match="sample_weight"):
        loss(TEACHER, STUDENT, sample_weight=np.ones(3))
    with pytest.raises(ValueError, match="sample_weight"):
        loss(TEACHER, STUDENT, sample_weight=np.ones((2, 3)))


def test_mask_of_a_long_float16_batch_does_not_overflow():
    """300 x 300 positions are past the largest float16."""
    teacher = np.zeros((300, 300, 1), "float16")
    loss = losses.Hint(dtype="float16", reduction="sum")
    mask = np.zeros((300, 300), "bool")
    mask[0, :4] = True
    assert float(loss(teacher, teacher + 1, mask=mask)) == 4.0
    mean = losses.Hint(dtype="float16")(teacher, 0 * teacher, mask=mask)
    assert np.isfinite(value(ops.cast(mean, "float32")))


def test_a_copy_shares_its_layers():
    """Keras copies a loss by saving it: the layers of a built loss were lost."""
    loss = losses.VID()
    loss.build((None, 4), (None, 3))
    twin = copy.copy(loss)
    assert twin.layers[0] is loss.layers[0]
    twin.temperature = 3.0
    assert loss.temperature is None


def test_config_leaves_out_the_default_precision():
    assert "dtype" not in losses.SoftTargets().get_config()
    assert losses.SoftTargets(dtype="float16").get_config()["dtype"] == "float16"
    assert "temperature" not in losses.Hint().get_config()


LOGITS = (
    *("SoftTargets", "ReverseKL", "JensenShannon", "TotalVariation", "LogitMSE", "LogitHuber"),
    *("BinarySoftTargets", "DecoupledKD", "DIST"),
)


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_never_spread_over_one_another(name):
    loss = getattr(losses, name)()
    options = {"labels": np.zeros(6, int)} if loss.reads_labels else {}
    loss(np.ones((6, 4)), np.zeros((6, 4)), **options)
    for one, other in (
        *(((6, 1, 4), (6, 4)), ((6, 4), (6, 1, 4)), ((6, 6, 4), (6, 4)), ((4,), (6, 4))),
        *(((6, 1, 4), (6, 5, 4)), ((6, 3, 4), (6, 5, 4)), ((6, 1), (6, 4)), ((1, 4), (6, 4))),
    ):
        with pytest.raises(ValueError, match="compares logits of one shape"):
            loss(np.ones(one), np.zeros(other), **options)


@pytest.mark.parametrize("name", ["Hint", "RKD", "SimilarityPreserving", "PKT", "PKD", "NST"])
def test_rows_of_one_side_are_never_spread_over_the_other(name):
    shape = (2, 3, 4) if name == "NST" else (4,)
    for teacher, student in ((1, 6), (6, 5)):
        with pytest.raises(ValueError, match="compares the same rows on both sides"):
            getattr(losses, name)()(np.ones((teacher, *shape)), np.zeros((student, *shape)))
