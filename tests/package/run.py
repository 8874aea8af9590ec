"""Build wheel and sdist, install each extra alone into an environment of its own, and use it.

    python tests/package/run.py [EXTRA ...] [--keep FOLDER]

It needs `build` (`make package` brings it) and works outside of the checkout, so that what runs is
what was installed. Versions are those of constraints.txt, or of the file of an extra that has one.
`dev` and `docs`, which are for this repository, are resolved and not installed.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TRAIN = """
import os
os.environ["KERAS_BACKEND"] = "{backend}"
import keras, numpy as np, keras_kd as kd
assert keras.backend.backend() == "{backend}"
def net(width):
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(width), keras.layers.Dense(3)])
x, y = np.ones((16, 6), "float32"), np.arange(16) % 3
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
student, teacher = net(2), net(4)
distiller = kd.Distiller(student, teacher)
distiller.compile("adam", loss)
history = distiller.fit(x, y, epochs=1, verbose=0).history
assert np.isfinite(history["distillation_loss"]).all(), history
"""

# What is there with an extra and nothing else.
USED = {
    # Without a backend Keras itself cannot be imported; what needs none is there.
    "": """
import sys
import keras_kd as kd
assert not {"keras", "tensorflow", "jax", "torch"} & set(sys.modules)
assert "Distiller" in dir(kd)
assert kd.cache.record_bytes(1000, top_k=100) == 400
try:
    kd.cache.verify("nowhere")
except FileNotFoundError as error:
    assert "nowhere" in str(error)
else:
    raise AssertionError("verified nothing")
""",
    "tensorflow": TRAIN.format(backend="tensorflow"),
    "jax": TRAIN.format(backend="jax"),
    "torch": TRAIN.format(backend="torch"),
    "export": TRAIN.format(backend="tensorflow")
    + """
chosen = {"precisions": ("float32", "int8"), "max_drop": None}
report = kd.export(student, "files", calibration=x, evaluation=(x, y), **chosen)
made = {(each.format, each.precision) for each in report.artifacts if each.path is not None}
assert made == {(f, p) for f in ("tflite", "onnx") for p in ("float32", "int8")}, report.table()
assert kd.export.load("files/model_float32.onnx")(x).shape == (16, 3)
""",
    "data": """
import keras_kd as kd
assert kd.datasets.load("digits").x_train.shape[1:] == (8, 8, 1)
import PIL, fsspec, tensorflow_datasets, upath
""",
    "report": """
import subprocess, sys
from pathlib import Path
command = Path(sys.executable).with_name("keras-kd")
said = subprocess.run([command, "doctor"], capture_output=True, text=True)  # 1: not all is there
assert said.returncode == 1 and "keras_kd[export]" in said.stdout, said
missing = subprocess.run([command, "verify", "nowhere"], capture_output=True, text=True)
assert missing.returncode == 2 and missing.stderr.count("\\n") == 1, missing
""",
    "robust": """
import os
os.environ["KERAS_BACKEND"] = "jax"
import numpy as np, keras_kd as kd
import art, matplotlib, PIL
images = np.random.default_rng(0).random((4, 16, 16, 3)).astype("float32")
for name in kd.robust.corruptions("image"):
    assert kd.robust.corrupt(images, name, 3).shape == images.shape, name
""",
    "search": TRAIN.format(backend="tensorflow")
    + """
import optuna
choice = kd.search.best_method(
    lambda: net(2), teacher, (x, y), (x, y), methods=["default"], seeds=2, epochs=1, loss=loss
)
assert "plain" in choice.table()
""",
    "federated": TRAIN.format(backend="tensorflow")
    + """
from dp_accounting import rdp
def member(seed):
    def make():
        model = net(2)
        model.compile("adam", loss)
        rows = np.random.default_rng(seed).random((12, 6), "float32")
        return kd.federated.Client(model, rows, y[:12])
    return make
federation = kd.federated.Federation(
    [member(0), member(1)],
    np.random.default_rng(2).random((16, 6), "float32"),
    engine=kd.federated.Flower(cpus=1),
    folder="federation",
)
assert federation.fit(rounds=1, queries=8, verbose=0).bytes_up > 0
assert federation.student(x).shape == (16, 3)
""",
    "all": """
import subprocess, sys
from pathlib import Path
command = Path(sys.executable).with_name("keras-kd")
said = subprocess.run([command, "doctor"], capture_output=True, text=True, check=True).stdout
print(said)
import keras_kd.cli.program, optuna, art, ai_edge_litert, onnxruntime, tensorflow_datasets
""",
}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# Those of this repository, and those for which nobody has written what they are good for.
RESOLVED = [name for name in EXTRAS if name not in USED]
# Those whose packages do not go with the newest of others.
PINNED = {"federated": "constraints-federated.txt"}
# What works on models needs a backend of Keras beside it.
BESIDE = {"robust": "robust,jax"}


def run(command, **options):
    """Run a command; what it said is shown where it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}\nfailed: {' '.join(map(str, command[:6]))} ...")
    return done.stdout


def built(folder):
    """The wheel, made of the sdist, and the sdist; both hold all of the package."""
    run([sys.executable, "-m", "build", "--outdir", folder, ROOT])
    [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    listed = run(["git", "ls-files", "keras_kd"], cwd=ROOT).split()
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    assert not set(listed) - inside, sorted(set(listed) - inside)
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert not {*listed, "LICENSE", "README.md", "pyproject.toml"} - packed
    return wheel


def environment(folder):
    """An environment, and what runs in it with nothing of ours around."""
    venv.create(folder, with_pip=True, symlinks=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KERAS")}
    kept.pop("PYTHONPATH", None)
    quiet = {"PYTHONSAFEPATH": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return folder / "bin" / "python", {**kept, **quiet}


def install(python, wheel, extra, *options):
    """Install the wheel with one extra."""
    wanted = f"keras_kd[{BESIDE.get(extra, extra)}] @ {wheel.as_uri()}" if extra else str(wheel)
    pinned = ROOT / PINNED.get(extra, "constraints.txt")
    run([python, "-m", "pip", "install", "--quiet", *options, "--constraint", pinned, wanted])


def main():
    """Build, then try every extra that is named, or all."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("extras", nargs="*", help="Default: all; `core` is none.")
    arguments.add_argument("--keep", type=Path, help="Where wheel and sdist are left.")
    given = arguments.parse_args()
    chosen = ["" if name == "core" else name for name in given.extras] or [*USED, *RESOLVED]
    for name in chosen:
        if name not in USED and name not in RESOLVED:
            sys.exit(f"`{name}` is no extra. There are: core, {', '.join([*USED, *RESOLVED][1:])}.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dist = (given.keep or folder / "dist").resolve()
        dist.mkdir(parents=True, exist_ok=True)
        for old in dist.iterdir():
            old.unlink()
        wheel = built(dist)
        print(f"built: {wheel.name} of the sdist, every file of the package in both", flush=True)
        for extra in chosen:
            if extra in RESOLVED:
                install(sys.executable, wheel, extra, "--dry-run")
                print(f"{extra}: resolved", flush=True)
                continue
            place = folder / (extra or "core")
            place.mkdir()
            python, variables = environment(place / "venv")
            install(python, wheel, extra)
            run([python, "-c", USED[extra]], cwd=place, env=variables)
            print(f"{extra or 'core'}: installed alone and used", flush=True)
            run(["rm", "-rf", place])
    print(f"{len(chosen)} passed, 0 failed")


if __name__ == "__main__":
    main()
