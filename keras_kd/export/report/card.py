"""A model card in Markdown: what the manifest knows, and nothing else."""

from __future__ import annotations

from typing import Any

from keras_kd.export.formats.device_table import together
from keras_kd.export.report.figures import latency, number, percent, size
from keras_kd.export.report.results import Results
from keras_kd.export.report.scorecard import heading
from keras_kd.utils.escaping import code, markdown


def render(report: Results) -> str:
    """Return the card.

    Args:
        report: What was exported.

    Returns:
        Markdown.
    """
    content = report.manifest
    model, evaluation, best = content["model"], content["evaluation"], report.best
    judged = report.scorecard()
    unit = " %" if judged.name == "accuracy" else ""
    lines = [f"# {markdown(model['name'])}", ""]
    if best is None:
        lines += ["No exported file passed its check.", ""]
    else:
        lines += [
            f"Take {code(best.file)}: {size(best.bytes)}, "
            + ("" if best.score is None else f"{judged.heading} {judged.text(best.score)}{unit}, ")
            + f"{latency(best.latency_ms)} ms for one inference with one thread.",
            "",
        ]
    lines += [
        "## Model",
        "",
        f"- {model['parameters']:,} parameters.",
        *(f"- Input {_tensor(info)}." for info in model["inputs"]),
        *(f"- Output {_tensor(info)}." for info in model["outputs"]),
    ]
    if model["labels"]:
        lines.append(
            f"- Classes in order: {', '.join(markdown(label) for label in model['labels'])}."
        )
    # Exports of earlier versions say nothing of pixels.
    for name, pixels in model.get("normalization", {}).items():
        mean, std = (", ".join(f"{value:g}" for value in pixels[key]) for key in ("mean", "std"))
        lines.append(
            f"- {code(name)} is an image: (pixel - mean) / std of pixels 0..255, with mean {mean} "
            f"and std {std}."
        )
    if model["quantization_aware"]:
        lines.append("- Trained with quantization in the loop.")
    lines += [
        "",
        "## Measured",
        "",
        f"On {evaluation['samples']:,} evaluation samples"
        f"{'' if evaluation['labeled'] else ' without labels'}, against the Keras model. Latency "
        "is the median of one inference with one thread on the machine of the export; that of "
        "Keras models uses all threads.",
        "",
        "| | status | size |"
        + ("" if judged.name is None else f" {markdown(judged.heading or '')}{unit} |")
        + " agreement % | worst difference | SQNR dB | ms |",
        "|---|---|---:|---:|---:|---:|---:|" + ("" if judged.name is None else "---:|"),
    ]
    for row in report.rows():
        cells = (
            code(row["file"], cell=True) if row["file"] else markdown(row["name"]),
            row["status"] or "reference",
            size(row["bytes"]),
            *((judged.text(row["score"]),) if judged.name is not None else ()),
            percent(row["agreement"]),
            number(row["worst"]),
            "-" if row["sqnr"] is None else f"{row['sqnr']:.1f}",
            latency(row["latency_ms"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    tables = {
        "On the labels": judged.rows(),
        "Classes": judged.classes(),
        "Entities": judged.entities(),
    }
    for title, table in tables.items():
        lines += _table(title, table)
    remarks = [
        f"- {artifact.format} {markdown(artifact.precision)}: {markdown(text)}"
        for artifact in report.artifacts
        for text in (artifact.reason, *artifact.flags, artifact.without_zeros())
        if text
    ]
    if remarks:
        lines += ["", "## Failures and flags", "", *remarks]
    lines += ["", "## Where the files run", ""]
    for file, answers in report.runtimes().items():
        groups = together(answers).items()
        said = "; ".join(f"{', '.join(names)}: {answer}" for answer, names in groups)
        lines.append(f"- {code(file)}: {markdown(said)}.")
    lines += [f"- {name}: {text}." for name, text in report.runtimes().advice().items()]
    lines += [f"- {markdown(sentence.removeprefix('> '))}." for sentence in report.given_up()]
    lines += ["", "## Files", ""]
    for artifact in report.artifacts:
        if artifact.file is None:
            continue
        lines.append(f"- {code(artifact.file)}, SHA-256 `{artifact.sha256}`")
        for kind in ("inputs", "outputs"):
            for tensor in artifact.details["signature"][kind]:
                lines.append(f"  - {kind[:-1]} {_file_tensor(tensor)}")
        if artifact.processors():
            lines.append(f"  - {markdown(artifact.processors())}")
    calibration = content["calibration"]
    lines += ["", "## How it was made", ""]
    if calibration is not None:
        ranges = "; ".join(
            f"{code(name)} from {low:.4g} to {high:.4g}"
            for name, (low, high) in calibration["ranges"].items()
        )
        lines.append(f"- Calibrated on {calibration['samples']} samples: {ranges}.")
    lines.append(
        f"- To pass, against the Keras model: {judged.limit(content['settings']['max_drop'])}."
    )
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines.append(f"- {markdown(versions)}.")
    return "\n".join(lines) + "\n"


def _table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["", f"### {title}", "", f"| {' | '.join(markdown(heading(key)) for key in keys)} |"]
    lines.append(f"|{'---|' * len(keys)}")
    for row in rows:
        values = (row.get(key) for key in keys)
        cells = (
            markdown(v) if isinstance(v, str) else "-" if v is None else f"{v:.4g}" for v in values
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _tensor(info: dict[str, Any]) -> str:
    shape = " x ".join("any" if size is None else str(size) for size in info["shape"])
    return f"{code(info['name'])}: {shape}, {markdown(info['dtype'])}"


def _file_tensor(info: dict[str, Any]) -> str:
    shape = " x ".join(markdown(size) for size in info["shape"])
    text = f"{code(info['name'])}: {shape}, {info['dtype']}"
    if "scale" in info:
        text += f", real = ({info['dtype']} - {info['zero_point']}) * {info['scale']:.9g}"
    return text
