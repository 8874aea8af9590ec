"""A format of somebody else's: dense networks as a text and an archive of matrices."""

import json
from pathlib import Path

import numpy as np

from keras_kd.export.formats import registry
from keras_kd.export.formats.base import Format
from keras_kd.export.rows import Contents, Converted


@registry.register
class Toy(Format):
    name = "toy"
    suffixes = (".toy", ".toyw")
    precisions = ("float32", "float16")
    packages = ("numpy",)
    color = "#77aa33"

    def convert(self, source, settings, task):
        layers = [layer for layer in source.keras_model().layers if layer.weights]
        path, more = Path(task.path), Path(task.path).with_suffix(".toyw")
        with open(more, "wb") as file:
            np.savez(file, *(np.asarray(v, task.precision) for x in layers for v in x.weights))
        text = {key: settings.about["signature"][key][0]["name"] for key in ("inputs", "outputs")}
        text["activations"] = [layer.activation.__name__ for layer in layers]
        path.write_text(json.dumps(text))
        return Converted((path.name, more.name), "dynamic")

    def open(self, path, threads=1):
        return Network(path)

    def contents(self, path):
        return Contents({"MatMul": len(Network(path).arrays) // 2})


class Network:
    free_batch = True

    def __init__(self, path):
        self.text = json.loads(path.read_text())
        with np.load(path.with_suffix(".toyw")) as found:
            self.arrays = [found[name].astype("float32") for name in found.files]

    def run(self, feed):
        x = feed[self.text["inputs"]]
        for i, activation in enumerate(self.text["activations"]):
            x = x @ self.arrays[2 * i] + self.arrays[2 * i + 1]
            x = np.maximum(x, 0) if activation == "relu" else x
        return {self.text["outputs"]: x}

    def prepare(self, feed):
        return lambda: self.run(feed)

    def signature(self):
        ends = {"inputs": len(self.arrays[0]), "outputs": len(self.arrays[-1])}
        row = {"dtype": "float32"}
        return {k: [{**row, "name": self.text[k], "shape": ["batch", n]}] for k, n in ends.items()}
