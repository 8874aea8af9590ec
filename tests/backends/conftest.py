"""The suite is collected with the other tests where their backend is TensorFlow."""

import sys
from pathlib import Path

import keras
import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collect_file(file_path, parent):
    given = parent.session.isinitpath(file_path)
    if file_path.name == "suite.py" and not given and keras.config.backend() == "tensorflow":
        return pytest.Module.from_parent(parent, path=file_path)
    return None
