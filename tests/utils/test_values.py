"""What numbers a dtype can hold."""

import keras
import ml_dtypes
import numpy as np
import pytest

import keras_kd
from keras_kd.utils.values import misfit


@pytest.mark.parametrize(
    ("values", "given", "dtype", "reason"),
    [
        ([1e39], "float64", "float32", "holds 1e+39, more than float32 can hold"),
        ([0.0, -1e39], "float64", "float32", "holds -1e+39, more than float32 can hold"),
        ([70_000.0], "float32", "float16", "holds 70000.0, more than float16 can hold"),
        ([70_000], "int64", "float16", "holds 70000, more than float16 can hold"),
        ([3.3e38], "bfloat16", "float16", "more than float16 can hold"),
        ([3e38, np.inf, -np.inf, np.nan, 1e-300, 0.1], "float64", "float32", None),
        ([2**53 + 1, -(2**62)], "int64", "float32", None),
        ([0, 2**31 - 1, -(2**31)], "int64", "int32", None),
        ([0, 2**31], "int64", "int32", "holds values from 0 to 2147483648"),
        ([2.0**31 - 128], "float32", "int32", None),
        ([2.0**31], "float32", "int32", "holds values from 2147483648.0 to 2147483648.0"),
        ([2.0**63], "float64", "int64", "holds values from"),
        ([-(2.0**63)], "float64", "int64", None),
        ([2**64 - 1], "uint64", "int64", "holds values from"),
        ([2**64 - 1], "uint64", "uint32", "holds values from"),
        ([-1, 3], "int8", "uint8", "holds values from -1 to 3"),
        ([-1, 3], "int8", "uint64", "holds values from -1 to 3"),
        ([256.0], "float16", "uint8", "holds values from 256.0 to 256.0"),
        ([np.nan], "float32", "int8", "holds values that are not whole, such as nan"),
        ([np.inf], "float32", "int8", "holds values from inf to inf"),
        ([0.5], "bfloat16", "int32", "holds values that are not whole, such as 0.5"),
        ([7.0], "bfloat16", "int32", None),
        ([True, False], "bool", "uint8", None),
        ([0, 1], "int64", "bool", None),
        ([2], "int64", "bool", "neither 0 nor 1, such as 2"),
        ([np.nan], "float32", "bool", "neither 0 nor 1, such as nan"),
        ([], "float64", "int8", None),
    ],
)
def test_what_a_dtype_cannot_hold(values, given, dtype, reason):
    kind = ml_dtypes.bfloat16 if given == "bfloat16" else given
    found = misfit(np.array(values, kind), dtype)
    assert found is None if reason is None else reason in found


def test_rows_are_given_by_their_arrays(tmp_path):
    data = keras_kd.datasets.load_task("digits")
    layers = [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)]
    model = keras.Sequential(layers)
    distiller = keras_kd.Distiller(model, None)
    distiller.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for given in (data, data.train, keras_kd.datasets.load("digits")):
        with pytest.raises(TypeError, match="`x` is a `.*, which holds .*: `data.train.x`"):
            distiller.fit(given)
    with pytest.raises(TypeError, match="The evaluation data is a `Rows`"):
        keras_kd.export(model, tmp_path / "none", calibration=data.train.x, evaluation=data.test)
