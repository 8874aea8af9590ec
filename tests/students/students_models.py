"""Small networks of the kinds that are shrunk, with names that repeat their structure."""

import keras
import numpy as np
from keras import layers, ops


def resnet(blocks=2, width=8, classes=5, size=16, name="resnet"):
    """Three stages of residual blocks; the first of a later stage projects its shortcut."""
    inputs = keras.Input((size, size, 3), name="image")
    x = layers.Conv2D(width, 3, padding="same", use_bias=False, name="stem")(inputs)
    for stage in range(3):
        for block in range(blocks):
            x = _residual(x, width * 2**stage, 2 if stage and not block else 1, f"{stage}{block}")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(classes, name="head")(x), name=name)


def _residual(x, filters, stride, name):
    y = layers.Conv2D(filters, 3, stride, "same", use_bias=False, name=f"c{name}a")(x)
    y = layers.BatchNormalization(name=f"b{name}a")(y)
    y = layers.ReLU(name=f"r{name}a")(y)
    y = layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"c{name}b")(y)
    y = layers.BatchNormalization(name=f"b{name}b")(y)
    if stride != 1 or x.shape[-1] != filters:
        x = layers.Conv2D(filters, 1, stride, use_bias=False, name=f"c{name}s")(x)
    return layers.ReLU(name=f"r{name}")(layers.Add(name=f"add{name}")([x, y]))


def resnet_parameters(blocks, widths, classes=5):
    """Counted by hand: 3x3 kernels without bias, four numbers a normalized channel."""
    total, before = 27 * widths[0], widths[0]
    for width in widths:
        for block in range(blocks):
            total += 9 * before * width + 9 * width * width + 8 * width
            total += before * width if not block and before != width else 0
            before = width
    return total + before * classes + classes


def transformer(count=4, dim=16, heads=4, after=False, classes=5, tokens=9, name="transformer"):
    """Blocks of attention and feed-forward, normalized before or after the sum."""
    inputs = keras.Input((tokens,), dtype="int32", name="ids")
    x = layers.Embedding(20, dim, mask_zero=True, name="embed")(inputs)
    for k in range(count):
        x = _attend(x, dim, heads, after, k)
        x = _feed(x, dim, after, k)
    if not after:
        x = layers.LayerNormalization(name="norm")(x)
    return keras.Model(inputs, layers.Dense(classes, name="head")(x[:, 0]), name=name)


def _attend(x, dim, heads, after, k):
    attention = layers.MultiHeadAttention(heads, dim // heads, name=f"att{k}")
    norm = layers.LayerNormalization(name=f"ln{k}a")
    if after:
        return norm(layers.Add(name=f"add{k}a")([x, attention(x, x)]))
    y = norm(x)
    return layers.Add(name=f"add{k}a")([x, attention(y, y)])


def _feed(x, dim, after, k):
    norm = layers.LayerNormalization(name=f"ln{k}b")
    y = x if after else norm(x)
    y = layers.Dense(4 * dim, "gelu", name=f"up{k}")(y)
    y = layers.Dense(dim, name=f"down{k}")(y)
    y = layers.Add(name=f"add{k}b")([x, y])
    return norm(y) if after else y


def transformer_parameters(count, dim, heads, size, classes=5, final=True):
    """Counted by hand; `size` is that of one head."""
    inner = heads * size
    attention = 3 * (dim * inner + inner) + inner * dim + dim
    feed = dim * 4 * dim + 4 * dim + 4 * dim * dim + dim
    norms = 4 * dim
    return 20 * dim + count * (attention + feed + norms) + 2 * dim * final + dim * classes + classes


def mobile(width=16, classes=4):
    """Depthwise, separable, gated, concatenated and flattened."""
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(width, 3, 2, "same", name="stem")(inputs)
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    y = layers.BatchNormalization(name="bn")(y)
    y = layers.SeparableConv2D(width, 3, padding="same", name="separable")(y)
    gate = layers.GlobalAveragePooling2D(keepdims=True, name="squeeze")(y)
    gate = layers.Dense(width // 4, "relu", name="gate1")(gate)
    gate = layers.Dense(width, "sigmoid", name="gate2")(gate)
    y = layers.Multiply(name="gated")([y, gate])
    z = layers.Conv2D(2 * width, 1, name="branch")(x)
    x = layers.Concatenate(name="both")([y, z])
    x = layers.Flatten(name="flat")(x)
    return keras.Model(inputs, layers.Dense(classes, name="head")(x), name="mobile")


def batch(model, count=4, seed=0):
    """Random rows that the model reads; some weights of BatchNormalization moved from 0 and 1."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if any(part in variable.path for part in ("moving", "gamma", "beta", "bias")):
            noise = rng.uniform(0.5, 1.5, variable.shape)
            variable.assign(noise.astype("float32"))
    shape = (count, *model.inputs[0].shape[1:])
    if "int" in model.inputs[0].dtype:
        return rng.integers(1, 20, shape)
    return rng.normal(size=shape).astype("float32")


def run(model, x):
    return ops.convert_to_numpy(model(x, training=False))
