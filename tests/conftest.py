"""Seeds for every test, and the folder on the path for what the tests share."""

import sys
from pathlib import Path

import keras
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(7)
