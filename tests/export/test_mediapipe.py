"""MediaPipe's `ImageClassifier` on exported files: `make mediapipe` prepares its environment."""

import json
import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve()


@pytest.fixture(scope="module")
def python():
    given = os.environ.get("KERAS_KD_MEDIAPIPE_PYTHON")
    path = Path(given) if given else HERE.parents[2] / ".venv-mediapipe" / "bin" / "python"
    if not path.exists():
        pytest.skip(
            f"no MediaPipe at {path}: run `make mediapipe`, or name a Python that has it in "
            "KERAS_KD_MEDIAPIPE_PYTHON"
        )
    return path


def test_image_classifier_gives_the_names_that_keras_gives(python, images):
    # Packages of this environment must not be found from the other one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(
        [python, HERE.with_name("mediapipe_check.py"), images.folder],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert set(found) == {"float32", "int8", "uint8"}
    for precision, worst in (("float32", 1e-5), ("uint8", 0.02)):
        assert found[precision]["taken"], found[precision]
        assert found[precision]["right"] == 1.0
        assert found[precision]["worst"] <= worst
        assert found[precision]["names"] == ["bluish", "green", "red"]
    # Signed bytes are what LiteRT and most accelerators take; MediaPipe passes pixels unsigned.
    assert found["int8"]["taken"] or "got INT8" in found["int8"]["reason"]
