"""MediaPipe's `ImageClassifier` on the TFLite files of an export, in MediaPipe's environment.

    python tests/export/mediapipe_check.py EXPORT_FOLDER

The export must have labels, normalization, and an image input of three channels. Prints one line of
JSON: for every file whether MediaPipe takes it, how often its best class has the name that the
Keras model gives, and how far its score is from the Keras model's. Neither Keras nor this package
is needed.
"""

import json
import sys
from pathlib import Path

import mediapipe as mp
import numpy as np
from mediapipe.tasks.python import BaseOptions, vision


def check(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (image,) = manifest["model"]["inputs"]
    pixels = manifest["model"]["normalization"][image["name"]]
    labels = manifest["model"]["labels"]
    with np.load(folder / "evaluation.npz") as arrays:
        x, want = arrays["x0"], arrays["y0"]
    x = np.rint(x * pixels["std"] + pixels["mean"]).astype("uint8")
    results = {}
    for row in manifest["artifacts"]:
        if row["format"] == "tflite":
            results[row["precision"]] = classify(folder / row["file"], x, want, labels)
    return results


def classify(path, x, want, labels):
    options = vision.ImageClassifierOptions(BaseOptions(model_asset_path=str(path)))
    try:
        classifier = vision.ImageClassifier.create_from_options(options)
    except (RuntimeError, ValueError, OSError) as error:
        return {"taken": False, "reason": str(error)}
    names, worst = [], 0.0
    with classifier:
        for sample, row in zip(x, want, strict=True):
            picture = mp.Image(mp.ImageFormat.SRGB, np.ascontiguousarray(sample))
            (found,) = classifier.classify(picture).classifications
            scores = {entry.category_name: entry.score for entry in found.categories}
            names.append(max(scores, key=scores.get))
            worst = max(worst, *(abs(scores[name] - row[i]) for i, name in enumerate(labels)))
    right = [name == labels[i] for name, i in zip(names, want.argmax(1), strict=True)]
    return {
        "taken": True,
        "right": float(np.mean(right)),
        "worst": float(worst),
        "names": sorted(set(names)),
    }


if __name__ == "__main__":
    print(json.dumps(check(Path(sys.argv[1]))))
