"""Answers of the runtimes beside those of the table: `python matrix.py FOLDER`.

Every file that the table says runs must load and agree; none that it refuses may answer wrongly
without a word, unless the table says that it would.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

# Which answers of the clients stand for which entries of the table.
CLIENTS = {
    "tflite-2.14": "tflite-2.14",
    "tflite-micro": "tflite-micro",
    "ethos-u55": "ethos-u55",
    "ethos-u65": "ethos-u65",
    "ethos-u85": "ethos-u85",
    "onnxruntime-1.17": "onnxruntime-1.17",
    "onnxruntime-1.20": "onnxruntime-1.17",
    "onnxruntime-newest": "onnxruntime-1.17",
    "onnxruntime-node": "onnxruntime-node",
    "onnxruntime-web": "onnxruntime-web",
    # With the settings that the table names.
    "openvino-exact": "openvino",
    "tract": "tract",
    "ncnn": "ncnn",
}
ARGMAX, FLOAT, STEPS = 0.995, 1e-3, 2.0
# What is rounded inside, as the precision says: as close as that allows.
LOOSE = {"float16": 1e-2, "dynamic": 2e-2, "weight_int4": 1e-2}


def read(folder, client):
    """Return arrays and notes by file."""
    given = folder / f"{client}.answers.json"
    if given.exists():
        found = json.loads(given.read_text())
        arrays = {k: np.asarray(v, "float32") for k, v in found.items() if isinstance(v, list)}
        return arrays, {k: v for k, v in found.items() if not isinstance(v, list)}
    path = folder / f"{client}.json"
    if not path.exists():
        return None, {}
    with np.load(folder / f"{client}.npz") as arrays:
        return dict(arrays), json.loads(path.read_text())


def said_steps(answer):
    """The figure that the table gives, in steps."""
    words = answer.split()
    return float(words[words.index("to") + 1]) if "steps" in words else 0.0


def compare(row, want, got):
    """Return `(agrees, figures)`."""
    got = got.reshape(want.shape)
    same = float((got.argmax(-1) == want.argmax(-1)).mean())
    apart = float(np.abs(got - want).max())
    relative = apart / float(np.abs(want).max())
    scale = row["signature"]["outputs"][0].get("scale") or row.get("output_scale")
    if row["precision"] == "int16x8":
        # A step is a 65,536th of the range.
        scale = None
    text = f"{100 * same:.1f} % of decisions, {relative:.1e} of the largest output"
    if scale:
        steps = apart / scale
        return same >= ARGMAX and steps <= row["allowed"] + 0.01, f"{text}, {steps:.1f} steps"
    return same >= ARGMAX and relative <= LOOSE.get(row["precision"], FLOAT), text


def compiled(answer, note):
    """Return the mark of what Vela put on the NPU."""
    on_cpu, on_npu = note.get("cpu", 0), note.get("npu", 0)
    if answer.startswith("no"):
        return "~" if on_npu else "-"
    return "+" if on_npu > 0 and (on_cpu > 0) == answer.startswith("slow") else "!"


def judged(row, answer, got, note, want):
    """Return a mark and what was seen.

    `+` runs as said, `-` is refused, or wrong, as said, `~` would run, `!` contradicts the table.
    """
    yes = not answer.startswith("no")
    if isinstance(note, dict):
        return compiled(answer, note), json.dumps(note)
    if got is None:
        return "!" if yes else "-", " ".join(str(note).split())[:90]
    agrees, figures = compare(row, want, got)
    if yes:
        return "+" if agrees else "!", figures
    if agrees:
        return "~", figures
    return "-" if "wrongly" in answer else "!", figures


def main(folder):
    counts, contradictions = Counter(), []
    for client, name in CLIENTS.items():
        arrays, notes = read(folder, client)
        if arrays is None:
            contradictions.append(f"{client} was not run")
            continue
        print(f"\n{client}")
        for path in sorted(folder.glob("*/manifest.json")):
            marks = []
            for row in json.loads(path.read_text())["artifacts"]:
                answer = (row.get("runtimes") or {}).get(name)
                if row["file"] is None or answer is None:
                    continue
                key = f"{path.parent.name}/{row['file']}"
                # The figure is of fewer samples than these.
                row["allowed"] = max(STEPS, said_steps(answer) + 1)
                row["output_scale"] = onnx_scale(path.parent / row["file"])
                want = np.load(path.parent / f"{row['file']}.npy")
                mark, text = judged(row, answer, arrays.get(key), notes.get(key), want)
                counts[mark] += 1
                marks.append(f"{row['precision']} {mark}")
                if mark in "!~":
                    line = f"{client}: {key}: table `{answer}`, seen: {text}"
                    print("   ", line)
                    if mark == "!":
                        contradictions.append(line)
            print(f"  {path.parent.name:14s}{'  '.join(marks)}")
    print(
        f"\n{counts['+']} run as said (+), {counts['-']} are refused as said (-), {counts['~']} "
        f"would run (~), {len(contradictions)} contradictions (!)"
    )
    for line in contradictions:
        print("!", line)
    return 1 if contradictions else 0


def onnx_scale(path):
    """Scale of the quantized output of an ONNX file, from its own metadata."""
    if path.suffix != ".onnx":
        return None
    import onnx

    props = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    borders = json.loads(props.get("quantization", "{}"))
    outputs = [entry["name"] for entry in json.loads(props["manifest"])["outputs"]]
    return next((borders[name]["scale"] for name in outputs if name in borders), None)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
