"""Export the students, run every runtime on them, print the matrix: `run.py FOLDER [NAME ...]`."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parents[1] / ".venv-runtimes"

# Environment, what the client calls its runtime, and the name of its answers.
CLIENTS = [
    ("tflite-runtime", "tflite-2.14", "tflite-2.14"),
    ("tflite-micro", "tflite-micro", "tflite-micro"),
    ("vela", "ethos-u55", "ethos-u55"),
    ("vela", "ethos-u65", "ethos-u65"),
    ("vela", "ethos-u85", "ethos-u85"),
    ("onnxruntime-1.17", "onnxruntime", "onnxruntime-1.17"),
    ("onnxruntime-1.20", "onnxruntime", "onnxruntime-1.20"),
    ("onnxruntime-newest", "onnxruntime", "onnxruntime-newest"),
    ("openvino", "openvino-exact", "openvino-exact"),
    ("tract", "tract", "tract"),
    ("ncnn", "ncnn", "ncnn"),
]


def main(folder, names):
    python, own = sys.executable, {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    subprocess.run([python, HERE / "students.py", folder, *names], env=own, check=True)
    # Packages of this environment must not be found from the others.
    plain = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    for environment, name, label in CLIENTS:
        print(f"running {label}", flush=True)
        client = [ENVIRONMENTS / environment / "bin" / "python", HERE / "client.py"]
        # What a runtime prints of itself is no result.
        log = folder / f"{label}.log"
        with open(log, "w") as file:
            subprocess.run(
                [*client, name, folder, label], env=plain, check=True, stdout=file, stderr=file
            )
    for name in ("onnxruntime-node", "onnxruntime-web"):
        print(f"running {name}", flush=True)
        subprocess.run(
            ["node", HERE / "client.mjs", name, folder], cwd=ENVIRONMENTS / "node", check=True
        )
    return subprocess.run([python, HERE / "matrix.py", folder], check=False).returncode


if __name__ == "__main__":
    target = Path(sys.argv[1]).absolute()
    target.mkdir(parents=True, exist_ok=True)
    sys.exit(main(target, sys.argv[2:]))
