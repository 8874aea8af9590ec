"""Smaller models: quantization-aware training, pruning, clustering, and back to plain Keras."""

from keras_kd.compress.cluster import ClusteredLayer, cluster, kmeans
from keras_kd.compress.fold import fold_batch_normalization
from keras_kd.compress.prune import PrunedLayer, prune
