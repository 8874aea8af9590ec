"""Proposed pairs: stages by resolution, blocks and layers by depth, in every kind of model."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_kd as kd
from keras_kd.models import taps
from keras_kd.transfers.layer_matching import LayerPairs, match_layers


def _cnn(stages, per_stage=2, width=4, size=32, name="cnn"):
    """Padded convolutions, pooled between the stages, with a gate that sees one pixel."""
    x = inputs = keras.Input((size, size, 3))
    for stage in range(stages):
        if stage:
            x = layers.MaxPooling2D(name=f"pool{stage}")(x)
        for k in range(per_stage):
            x = layers.ZeroPadding2D(1, name=f"pad{stage}{k}")(x)
            x = layers.Conv2D(width, 3, name=f"conv{stage}{k}")(x)
            x = layers.ReLU(name=f"relu{stage}{k}")(x)
        gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
        x = layers.Multiply(name=f"gate{stage}")([x, layers.Dense(width)(gate)])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(x), name=name)


def _transformer(count, dim, after=False, name=None):
    x = inputs = keras.Input((6, dim))
    for k in range(count):
        norm = [layers.LayerNormalization(name=f"norm{k}{part}") for part in "ab"]
        y = x if after else norm[0](x)
        x = layers.Add(name=f"mid{k}")([x, layers.MultiHeadAttention(2, 4)(y, y)])
        x = norm[0](x) if after else x
        y = x if after else norm[1](x)
        x = layers.Add(name=f"end{k}")([x, layers.Dense(dim)(layers.Dense(2 * dim)(y))])
        x = norm[1](x) if after else x
    x = x if after else layers.LayerNormalization(name="final")(x)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)), name=name)


def _mlp(widths, **options):
    hidden = [layers.Dense(w, "relu", name=f"d{i}", **options) for i, w in enumerate(widths)]
    return keras.Sequential([keras.Input((5,)), *hidden, layers.Dense(3, name="logits")])


def _names(pairs):
    return [(pair.student, pair.teacher) for pair in pairs]


def test_stages_are_matched_by_resolution_at_their_last_layer():
    pairs = match_layers(_cnn(2, 1), _cnn(3, 2, width=8))
    assert _names(pairs) == [("gate0", "gate0"), ("gate1", "gate1")]
    assert pairs[1].student_shape == (None, 16, 16, 4)
    assert pairs[1].teacher_shape == (None, 16, 16, 8)


def test_stages_of_other_resolutions_are_matched_by_depth():
    pairs = match_layers(_cnn(2, 1, size=24), _cnn(4, 1, size=64))
    assert _names(pairs) == [("gate0", "gate1"), ("gate1", "gate3")]


def test_a_pyramid_that_grows_again_and_its_output():
    def unet(width):
        inputs = keras.Input((16, 16, 1))
        a = layers.Conv2D(width, 3, padding="same", name="down0")(inputs)
        b = layers.Conv2D(width, 3, 2, padding="same", name="down1")(a)
        c = layers.UpSampling2D(name="up")(b)
        c = layers.Conv2D(width, 3, padding="same", name="up0")(layers.Add(name="sum")([a, c]))
        c = layers.Conv2D(2, 1, name="logits")(c)
        return keras.Model(inputs, layers.Softmax()(c))

    assert _names(match_layers(unet(2), unet(4))) == [(n, n) for n in ("down0", "down1", "up0")]


def test_open_sizes_need_a_batch():
    def model(width):
        x = inputs = keras.Input((None, None, 3))
        for k in range(2):
            x = layers.Conv2D(width, 3, 2, padding="same", name=f"c{k}")(x)
        return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))

    with pytest.raises(ValueError, match=r"sizes are not known.*`x=`"):
        match_layers(model(2), model(4))
    pairs = match_layers(model(2), model(4), x=np.zeros((1, 16, 8, 3)))
    assert _names(pairs) == [("c0", "c0"), ("c1", "c1")]
    assert pairs[0].student_shape == (None, 8, 4, 2)


@pytest.mark.parametrize(("after", "name"), [(False, "end{}"), (True, "norm{}b")])
def test_transformer_blocks_are_spread_evenly(after, name):
    pairs = match_layers(_transformer(2, 4, after), _transformer(6, 8, after))
    assert _names(pairs) == [
        (name.format(0), name.format(2)),
        (name.format(1), name.format(5)),
    ]
    reverse = match_layers(_transformer(6, 4, after), _transformer(2, 8, after))
    assert _names(reverse) == [(b, a) for a, b in _names(pairs)]


def test_dense_layers_by_depth_behind_their_activation():
    teacher = keras.Sequential([keras.Input((5,))])
    for k in range(4):
        for layer in (layers.Dense(8), layers.BatchNormalization(), layers.ReLU(name=f"r{k}")):
            teacher.add(layer)
        teacher.add(layers.Dropout(0.1))
    teacher.add(layers.Dense(3))
    teacher.add(layers.Softmax())
    assert _names(match_layers(_mlp([4, 4]), teacher)) == [("d0", "r1"), ("d1", "r3")]


def test_recurrent_layers_by_depth():
    def model(count):
        x = inputs = keras.Input((7, 3))
        for k in range(count):
            x = layers.GRU(4, return_sequences=k + 1 < count, name=f"gru{k}")(x)
        return keras.Model(inputs, layers.Dense(2)(x))

    pairs = match_layers(model(1), model(2))
    assert _names(pairs) == [("gru0", "gru1")]
    assert pairs[0].teacher_shape == (None, 4)


def test_one_dimensional_convolutions_have_stages():
    def model(count):
        x = inputs = keras.Input((32, 2))
        for k in range(count):
            x = layers.Conv1D(4, 3, 2, padding="same", name=f"c{k}")(x)
        return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))

    assert _names(match_layers(model(2), model(3))) == [("c0", "c0"), ("c1", "c1")]


def test_unlike_models_are_matched_by_depth_with_a_projector_that_fits():
    cnn = _cnn(2, 1, size=16)
    vit = _transformer(4, 8)
    pairs = match_layers(cnn, vit)
    assert _names(pairs) == [("gate0", "end1"), ("gate1", "end3")]
    # Six tokens fill no square.
    assert "cannot join" in str(pairs)


def test_nested_models_are_opened_and_their_paths_can_be_read():
    inner = _cnn(2, 1, name="inner")
    body = keras.Model(inner.input, inner.layers[-2].output, name="body")
    inputs = keras.Input((32, 32, 3))
    student = keras.Model(inputs, layers.Dense(3, name="top")(body(layers.Rescaling(2.0)(inputs))))
    pairs = match_layers(student, _cnn(2, 2))
    assert _names(pairs) == [("body/gate0", "gate0"), ("body/gate1", "gate1")]
    assert taps.find(student, "body/gate0", "student").layer is body.get_layer("gate0")


class Block(layers.Layer):
    def __init__(self, dim, **options):
        super().__init__(**options)
        self.attention, self.dense = layers.MultiHeadAttention(2, 4), layers.Dense(dim)

    def call(self, x):
        x = x + self.attention(x, x)
        return x + self.dense(x)


class Encoder(keras.Model):
    def __init__(self, count, dim):
        super().__init__()
        self.embed = layers.Embedding(10, dim)
        self.blocks = [Block(dim, name=f"block{k}") for k in range(count)]
        self.head = layers.Dense(3)

    def call(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Plain(keras.Model):
    def __init__(self, width):
        super().__init__()
        self.first = layers.Conv2D(width, 3, padding="same", name="first")
        self.pool = layers.MaxPooling2D(name="pool")
        self.second = layers.Conv2D(width, 3, padding="same", name="second")
        self.head = layers.Dense(2, name="head")

    def call(self, x):
        x = self.second(self.pool(self.first(x)))
        return self.head(keras.ops.mean(x, axis=(1, 2)))


def test_subclassed_models_are_seen_at_work():
    ids = np.zeros((2, 5), "int32")
    student, teacher = Encoder(2, 4), Encoder(4, 8)
    with pytest.raises(ValueError, match=r"class Encoder shows no graph.*`x=`"):
        match_layers(student, teacher)
    pairs = match_layers(student, teacher, x=ids)
    assert _names(pairs) == [("block0", "block1"), ("block1", "block3")]
    assert pairs[0].teacher_shape == (None, 5, 8)
    image = np.zeros((1, 8, 8, 3), "float32")
    pairs = match_layers(Plain(2), _cnn(2, 1, size=8), x=image)
    assert _names(pairs) == [("first", "gate0"), ("second", "gate1")]
    mixed = match_layers(_mlp([4]), Plain(2), x=np.zeros((1, 5)), teacher_x=image)
    assert _names(mixed) == [("d0", "second")]


class Stack(layers.Layer):
    """Several blocks in one layer, as the encoders of vision transformers."""

    def __init__(self, count, width, attention=False):
        super().__init__(name="stack")
        made = OwnAttention if attention else Block
        self.blocks = [made(width, name=f"block{i}") for i in range(count)]

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class OwnAttention(layers.Layer):
    """A block around an attention layer that is none of Keras's."""

    def __init__(self, width, name):
        super().__init__(name=name)
        self.attention = SlidingAttention(width)

    def call(self, x):
        return x + self.attention(x)


class SlidingAttention(layers.Layer):
    def __init__(self, width):
        super().__init__()
        self.query_dense = layers.Dense(width)

    def call(self, x):
        return self.query_dense(x)


@pytest.mark.parametrize("attention", [False, True])
def test_blocks_inside_a_layer_of_the_graph_are_found(attention):
    def model(count, width, length=5):
        inputs = keras.Input((length, width))
        hidden = Stack(count, width, attention)(inputs)
        return keras.Model(inputs, layers.Dense(2)(hidden))

    student, teacher = model(2, 4), model(4, 8)
    pairs = match_layers(student, teacher)
    assert _names(pairs) == [("stack/block0", "stack/block1"), ("stack/block1", "stack/block3")]
    assert pairs[0].teacher_shape == (None, 5, 8)
    rows = np.zeros((3, 5, 4), "float32")
    tap = taps.find(student, pairs[1].student, "student")
    assert taps.read(student, rows, {"t": tap}, False).tensors["t"].shape == (3, 5, 4)
    student = model(2, 4, None)
    with pytest.raises(ValueError, match="no graph of its blocks.*`x=`"):
        match_layers(student, teacher)
    assert _names(match_layers(student, teacher, rows, np.zeros((3, 5, 8)))) == _names(pairs)


def test_attention_that_is_called_again_and_again_is_refused():
    inputs = keras.Input((5, 4))
    block = Block(4, name="block")
    model = keras.Model(inputs, layers.Dense(2)(block(block(inputs))))
    with pytest.raises(ValueError, match="calls its attention layers more than once"):
        match_layers(model, model)


def test_the_table_fits_80_columns():
    pairs = match_layers(_cnn(2, 1), _cnn(2, 2, width=8))
    lines = str(pairs).splitlines()
    assert max(map(len, lines)) <= 80
    headings = ["Student layer", "Shape", "Teacher layer", "Shape", "Projector"]
    assert lines[0].split() == " ".join(headings).split()
    assert lines[2].split() == ["gate0", "32x32x4", "gate0", "32x32x8", "conv", "1x1"]
    assert len(lines) == 4


def test_transfers_train_with_losses_of_their_own():
    student, teacher = _cnn(2, 1, size=8, name="student"), _cnn(2, 2, width=6, size=8)
    pairs = match_layers(student, teacher)
    transfers = pairs.transfers(kd.losses.Hint(), weight=3.0)
    assert [t.name for t in transfers] == ["hint_gate0", "hint_gate1"]
    assert {t.projector for t in transfers} == {"auto"}
    assert [float(t.weight) for t in transfers] == [3.0, 3.0]
    assert transfers[0].loss is not transfers[1].loss
    distiller = kd.Distiller(student, teacher)
    distiller.compile("sgd", loss=None, distillation_loss=[kd.losses.SoftTargets(), *transfers])
    x = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype("float32")
    logs = distiller.fit(x, epochs=1, verbose=0).history
    assert np.isfinite(logs["hint_gate0"] + logs["hint_gate1"]).all()
    assert [row["projection"] for row in distiller.summary_of_transfers()] == [
        "none",
        "conv 1x1",
        "conv 1x1",
    ]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="no hidden layers"):
        match_layers(_mlp([]), _mlp([4]))
    with pytest.raises(TypeError, match="student"):
        match_layers("cnn", _mlp([4]))
    with pytest.raises(ValueError, match="no pairs"):
        LayerPairs().transfers(kd.losses.Hint())
    with pytest.raises(TypeError, match="one layer|None or the name of a kind"):
        match_layers(_mlp([4]), _mlp([8])).transfers(kd.losses.Hint(), projector=layers.Dense(8))
