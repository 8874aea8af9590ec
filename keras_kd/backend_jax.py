"""What only the JAX backend needs; imported when that backend is in use."""

import jax


def process_index() -> int:
    """The number of this process among those that train together."""
    return int(jax.process_index())
