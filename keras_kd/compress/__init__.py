"""Smaller models: quantization-aware training, pruning, clustering, and back to plain Keras."""

from keras_kd.compress import tfmot
from keras_kd.compress.channels import remove_channels
from keras_kd.compress.cluster import ClusteredLayer, cluster, kmeans
from keras_kd.compress.describe import summary
from keras_kd.compress.fake_quantize import FakeQuantize, quantized_weights
from keras_kd.compress.finalize import finalize, sparsity
from keras_kd.compress.observers import (
    FreezeObservers,
    activation_ranges,
    calibrate,
    has_activation_quantization,
    is_calibrated,
)
from keras_kd.compress.prune import PrunedLayer, magnitude_mask, n_of_m_mask, prune
from keras_kd.compress.quantize import Annotation, is_quantize_aware, quantize_aware
from keras_kd.compress.quantized_layers import QuantizedAffine, QuantizedLayer
from keras_kd.compress.quantized_model import FloatBorder, QuantizedModel
from keras_kd.compress.quantized_operations import (
    QuantizedMean,
    QuantizedRepeat,
    QuantizedSwish,
)
from keras_kd.compress.quantized_sequences import (
    QuantizedAttention,
    QuantizedLayerNormalization,
    QuantizedRecurrent,
)
from keras_kd.models.folding import fold_batch_normalization

__all__ = [
    "Annotation",
    "ClusteredLayer",
    "FakeQuantize",
    "FloatBorder",
    "FreezeObservers",
    "PrunedLayer",
    "QuantizedAffine",
    "QuantizedAttention",
    "QuantizedLayer",
    "QuantizedLayerNormalization",
    "QuantizedMean",
    "QuantizedModel",
    "QuantizedRecurrent",
    "QuantizedRepeat",
    "QuantizedSwish",
    "activation_ranges",
    "calibrate",
    "cluster",
    "finalize",
    "fold_batch_normalization",
    "has_activation_quantization",
    "is_calibrated",
    "is_quantize_aware",
    "kmeans",
    "magnitude_mask",
    "n_of_m_mask",
    "prune",
    "quantize_aware",
    "quantized_weights",
    "remove_channels",
    "sparsity",
    "summary",
    "tfmot",
]
