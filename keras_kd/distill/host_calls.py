"""Teachers that are asked on the host, and steps that XLA compiles.

On TensorFlow XLA calls no host. A step that asks such a teacher is compiled without XLA; one that
reads its answers from memory, or evaluates the student alone, is compiled as it was asked for.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from keras_kd import backends
from keras_kd.distill.pairing import Pairing


class HostCalls:
    """Whether the steps of a distiller are compiled by XLA.

    Args:
        pairing: The models.
    """

    def __init__(self, pairing: Pairing) -> None:
        self._pairing = pairing
        self._wanted = False

    def settle(self, distiller: Any, asked: Any = "auto") -> None:
        """Leave XLA out beside a teacher on the host, and note whether it was wanted.

        Args:
            distiller: It was compiled, or got its teacher, just now.
            asked: The `jit_compile` of `compile`.
        """
        self._wanted = False
        if not self._pairing.asks_host or backends.host_calls_in_jit() or not distiller.jit_compile:
            return
        if asked is True:
            warnings.warn(
                f"`jit_compile=True` holds for `{distiller.name}` where the answers of its teacher "
                "are in memory: on TensorFlow a step that asks it on the host is compiled without "
                "XLA, which calls no host.",
                stacklevel=4,
            )
        self._wanted = True
        distiller.jit_compile = False

    @contextlib.contextmanager
    def compiling(self, distiller: Any, asks: bool) -> Iterator[None]:
        """Compile in here with XLA where it was wanted and the step calls no host.

        Args:
            distiller: What takes the step.
            asks: Whether the step asks the teacher. A penalty may ask it at any time.
        """
        if not self._wanted or asks or distiller.penalties:
            yield
            return
        distiller.jit_compile = True
        try:
            yield
        finally:
            distiller.jit_compile = False
