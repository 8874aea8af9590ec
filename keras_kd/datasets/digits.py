"""Scikit-learn's digits: real handwriting that is at hand without a network."""

from __future__ import annotations

import numpy as np

from keras_kd.datasets.dataset import Dataset, assemble, stratified


def load() -> Dataset:
    """Load 1,797 handwritten digits of 8 by 8 pixels, split the same way every time.

    The images are NIST forms, each pixel the count of ink in a cell of 4 by 4, divided by its
    largest value 16. 359 samples are the test split and 216 the validation split, both stratified
    with a fixed seed.

    Returns:
        A `Dataset` of images `(8, 8, 1)` in `[0, 1]` and ten classes.

    Raises:
        ImportError: If scikit-learn, which carries the data, is not installed.

    Examples:
        >>> data = load()
        >>> data.sizes
        {'train': 1222, 'validation': 216, 'test': 359}

    Reference:
        - Alpaydin and Kaynak, 1998, "Optical Recognition of Handwritten Digits", UCI Machine
          Learning Repository
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn, which is not installed. "
            'Install it with: pip install "keras_kd[data]"'
        ) from error
    source = load_digits()
    x = (source.images[..., np.newaxis] / 16.0).astype(np.float32)
    y = source.target
    test = stratified(y, 0.2)
    rest = np.flatnonzero(~test)
    chosen = stratified(y[rest], 0.15)
    train, validation = rest[~chosen], rest[chosen]
    return assemble(
        "digits",
        (x[train], y[train]),
        test=(x[test], y[test]),
        validation=(x[validation], y[validation]),
    )
