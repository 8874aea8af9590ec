#!/usr/bin/env bash
# keras 3.15.1, tensorflow 2.21.0 (tensorflow-cpu), numpy 2.4.6.
#
# On the TensorFlow backend the graph of a training step outlives its model: after `fit` of a fresh
# model, `del model`, `keras.utils.clear_session()` and `gc.collect()` its `FuncGraph`, named
# `one_step_on_data`, is still there with all of its operations, one more for every model that was
# trained. `evaluate` and `predict` leave none, nor does a step that takes gradients and applies
# none: it is `optimizer.apply` in a `tf.function` that leaves the graph behind. Whoever trains many
# models in one process, as a search does, is told to call `clear_session`, which does not help;
# fitting one model again and again leaves nothing, and neither does `run_eagerly=True`.
#
# Output seen:
#   graphs left by 3 models: fit 3, fit and clear_session 3, fit eagerly 0, evaluate 0
#   by 3 functions: gradients alone 0, gradients applied 3; by 3 fits of one model: 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "keras==3.15.1" "tensorflow-cpu==2.21.0" "numpy==2.4.6"
KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - <<'PYTHON'
import gc

import keras
import numpy as np
import tensorflow as tf

X, Y = np.ones((32, 6), "float32"), np.zeros((32, 1), "float32")


def made(**options):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", **options)
    return model


def fit():
    made().fit(X, Y, verbose=0)


def fit_and_clear():
    fit()
    keras.utils.clear_session()


def fit_eagerly():
    made(run_eagerly=True).fit(X, Y, verbose=0)


def evaluate():
    made().evaluate(X, Y, verbose=0)


def stepped(applied):
    model = made()

    @tf.function(autograph=False)
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x))
        gradients = tape.gradient(loss, model.trainable_weights)
        if applied:
            model.optimizer.apply(gradients, model.trainable_weights)
        return loss

    step(tf.constant(X))


def graphs():
    for _ in range(3):
        gc.collect()
    return sum(type(each).__name__ == "FuncGraph" for each in gc.get_objects())


def left(work):
    work()
    before = graphs()
    for _ in range(3):
        work()
    return graphs() - before


one = made()
models = [left(work) for work in (fit, fit_and_clear, fit_eagerly, evaluate)]
print("graphs left by 3 models: fit {}, fit and clear_session {}, fit eagerly {}, evaluate {}".format(*models))
functions = [left(lambda: stepped(False)), left(lambda: stepped(True))]
again = left(lambda: one.fit(X, Y, verbose=0))
print("by 3 functions: gradients alone {}, gradients applied {}; by 3 fits of one model: {}".format(*functions, again))
assert (models, functions, again) == ([3, 3, 0, 0], [0, 3], 0), "the behavior has changed"
PYTHON
