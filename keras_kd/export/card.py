"""A model card in Markdown: what the manifest knows, and nothing else."""

from __future__ import annotations

from typing import Any

from .report import Report, latency, number, percent, points, size
from .runtimes import together


def render(report: Report) -> str:
    """Return the card.

    Args:
        report: What was exported.

    Returns:
        Markdown.
    """
    content = report.manifest
    model, evaluation, best = content["model"], content["evaluation"], report.best
    lines = [f"# {_plain(model['name'])}", ""]
    if best is None:
        lines += ["No exported file passed its check.", ""]
    else:
        lines += [
            f"Take `{best.file}`: {size(best.bytes)}, {_accuracy(best.accuracy)}"
            f"{latency(best.latency_ms)} ms for one inference with one thread.",
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
            f"- Classes in order: {', '.join(_plain(label) for label in model['labels'])}."
        )
    # Exports of earlier versions say nothing of pixels.
    for name, pixels in model.get("normalization", {}).items():
        mean, std = (", ".join(f"{value:g}" for value in pixels[key]) for key in ("mean", "std"))
        lines.append(
            f"- `{name}` is an image: (pixel - mean) / std of pixels 0..255, with mean {mean} and "
            f"std {std}."
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
        "| | status | size | accuracy % | agreement % | worst difference | SQNR dB | ms |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report.rows():
        cells = (
            f"`{row['file']}`" if row["file"] else row["name"],
            row["status"] or "reference",
            size(row["bytes"]),
            percent(row["accuracy"]),
            percent(row["agreement"]),
            number(row["worst"]),
            "-" if row["sqnr"] is None else f"{row['sqnr']:.1f}",
            latency(row["latency_ms"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    remarks = [
        f"- {artifact.format} {artifact.precision}: {_plain(text)}"
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
        lines.append(f"- `{file}`: {_plain(said)}.")
    lines += [f"- {_plain(sentence.removeprefix('> '))}." for sentence in report.given_up()]
    lines += ["", "## Files", ""]
    for artifact in report.artifacts:
        if artifact.file is None:
            continue
        lines.append(f"- `{artifact.file}`, SHA-256 `{artifact.sha256}`")
        for kind in ("inputs", "outputs"):
            for tensor in artifact.details["signature"][kind]:
                lines.append(f"  - {kind[:-1]} {_file_tensor(tensor)}")
    calibration = content["calibration"]
    lines += ["", "## How it was made", ""]
    if calibration is not None:
        ranges = "; ".join(
            f"`{name}` from {low:.4g} to {high:.4g}"
            for name, (low, high) in calibration["ranges"].items()
        )
        lines.append(f"- Calibrated on {calibration['samples']} samples: {ranges}.")
    limit = content["settings"]["max_drop"]
    lines.append(
        "- No limit was set on the accuracy lost."
        if limit is None
        else f"- A file may lose {points(limit)} of accuracy against the Keras model."
    )
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines.append(f"- {versions}.")
    return "\n".join(lines) + "\n"


def _accuracy(value: float | None) -> str:
    return "" if value is None else f"accuracy {percent(value)} %, "


def _tensor(info: dict[str, Any]) -> str:
    shape = " x ".join("any" if size is None else str(size) for size in info["shape"])
    return f"`{info['name']}`: {shape}, {info['dtype']}"


def _file_tensor(info: dict[str, Any]) -> str:
    shape = " x ".join(str(size) for size in info["shape"])
    text = f"`{info['name']}`: {shape}, {info['dtype']}"
    if "scale" in info:
        text += f", real = ({info['dtype']} - {info['zero_point']}) * {info['scale']:.9g}"
    return text


def _plain(text: str) -> str:
    # A name is no place for Markdown or HTML of its own.
    for character in "\\`*_<>[]#|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
