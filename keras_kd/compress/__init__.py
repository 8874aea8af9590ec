"""Smaller models: quantization-aware training, pruning, clustering, and back to plain Keras."""
