"""Which files pass, what deserves a second look, and which one is best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from keras_kd.export.formats import device_table
from keras_kd.export.rows import ArtifactRow, Failure, KerasOutput, Measured, OutputFigures
from keras_kd.export.verification import useless_files

# Largest difference from the Keras model over the largest output, and lowest SQNR in dB, that
# rounding explains. A lost activation or a misread weight lies far beyond.
_TOLERANCE = {"float32": (1e-3, 60.0), "float16": (3e-2, 35.0)}

# A quantization-aware model rounds its activations in Keras too, and its float files do not.
_AWARE_TOLERANCE = (0.5, 10.0)

# The share of decisions within the model that near ties explain, beyond which, and beyond two of
# them, an operator is wrong.
_TIES = {"float32": 0.01, "float16": 0.05, "aware": 0.5}

# Regression has no accuracy to lose: its files must keep nine tenths of the signal's amplitude, and
# two thirds of what changes from sample to sample, which a large constant part would hide.
_LEAST_SQNR = 20.0
_LEAST_VARIATION = 10.0

# Scales, biases and what a format cannot hold narrower come to less in a model of any size.
_FLOAT_WEIGHTS = 0.3

SLOWER = 1.25
"""How many times slower a file must be to be called slower: less is the noise of a machine."""

EQUAL = 1e-5
"""Largest difference of the answers, over the largest answer, that the order of sums explains."""


def judge(
    rows: Sequence[ArtifactRow],
    max_drop: float | None,
    aware: bool,
    before: Mapping[str, KerasOutput] | None = None,
    causes: useless_files.Causes | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> list[ArtifactRow]:
    """Judge measured files: which fail, and what deserves a second look.

    Args:
        rows: Of the manifest.
        max_drop: What each output may lose, 0..1, or `None`.
        aware: Whether the Keras model is quantization-aware.
        before: What the Keras model reaches by output.
        causes: Finds what took the signal of a file.
        labels: Names of the classes by output, where they are known.

    Returns:
        The rows with what was decided.
    """
    floats = {row.format: row for row in rows if row.precision == "float32" and row.measured}
    return [
        row
        if row.measured is None
        else _judged(row, max_drop, aware, before or {}, causes, labels or {}, floats)
        for row in rows
    ]


def _judged(
    row: ArtifactRow,
    max_drop: float | None,
    aware: bool,
    before: Mapping[str, KerasOutput],
    causes: useless_files.Causes | None,
    labels: Mapping[str, Sequence[str]],
    floats: Mapping[str, ArtifactRow],
) -> ArtifactRow:
    measured = row.measured
    assert measured is not None
    outputs = measured.metrics.outputs
    drops = [output.lost for output in outputs.values() if output.lost is not None]
    row = replace(row, drop=max(drops, default=None))
    if len(outputs) > 1:
        worst = max(outputs, key=lambda name: _burden(outputs[name], max_drop))
        row = replace(row, worst_output=worst)
    stage, reason = _fault(row, measured, max_drop, aware, before, causes, labels)
    if reason:
        row = replace(row, status="failed", stage=stage, reason=reason)
    float32 = floats.get(row.format)
    flags = _flags(row, measured, None if float32 is None else float32.measured)
    flags += _doubts(row, measured, before, causes, labels)
    if row.without_mixed:
        flags.append(f"`mixed` was not tried: {row.without_mixed}")
    unclear = [name for name, output in outputs.items() if output.kind == "unknown"]
    if unclear and max_drop is not None and row.precision == "float32":
        flags.append(
            f"nothing says whether `{'`, `'.join(unclear)}` holds classes, so files must keep "
            "its decisions and its values; evaluation data with labels, class names or a "
            "compiled loss would tell"
        )
    return replace(row, flags=tuple(flags))


_SUMMED = 20.0
"""Decibels that a file with sums of 16-bit integers keeps where they are right."""


def _fault(
    row: ArtifactRow,
    measured: Measured,
    max_drop: float | None,
    aware: bool,
    before: Mapping[str, KerasOutput],
    causes: useless_files.Causes | None,
    labels: Mapping[str, Sequence[str]],
) -> tuple[str, str]:
    figures = measured.metrics
    beyond = "" if causes is None else causes.float16(row, measured)
    if not figures.finite:
        broken = "" if causes is None else causes.broken(measured) or causes.scales(measured)
        told = "; ".join(text for text in (beyond, broken) if text)
        return "verify", "it gives NaN or infinite values on the evaluation data" + (
            f": {told}" if told else ""
        )
    if causes is not None and causes.broken(measured):
        texts = (causes.broken(measured), causes.scales(measured), causes.instead(row, measured))
        return "verify", ". ".join(text for text in texts if text)
    if row.precision in _TOLERANCE:
        relative, decibels = _AWARE_TOLERANCE if aware else _TOLERANCE[row.precision]
        if figures.relative > relative or figures.sqnr < decibels:
            return "verify", (
                f"its outputs differ from the Keras model's by up to {figures.worst:.3g} "
                f"({figures.sqnr:.1f} dB), more than rounding to {row.precision} explains: "
                + (beyond or "an operator was converted wrongly")
            )
        wrong = _other_decisions(figures.outputs, row.precision, aware)
        if wrong:
            return "verify", wrong + (beyond or "an operator was converted wrongly")
    summed = measured.contents.operators.get("SUM", 0)
    if row.precision == "int16x8" and summed and figures.sqnr < _SUMMED:
        return "verify", (
            f"its outputs keep {figures.sqnr:.1f} dB of the Keras model's, and it sums up 16-bit "
            f"integers ({summed} SUM), which LiteRT does wrongly for some rows: take int8, or a "
            "mean in place of the sum"
        )
    several = len(figures.outputs) > 1
    # One output must not make up for another.
    for name, output in figures.outputs.items():
        where = f"at output `{name}`, " if several else ""
        told = "" if causes is None else causes.of(row, measured, name)
        lost = "" if max_drop is None else _loss(output, max_drop)
        dead = useless_files.useless(output, before.get(name), max_drop)
        if lost:
            return "budget", where + lost + (f"; {dead}{told}" if dead else "")
        if dead:
            return "verify", where + dead + told
        # A metric of the user's own decides in place of accuracy and of what stands behind it.
        if max_drop is not None and not output.chosen:
            lost = useless_files.class_loss(output, before.get(name), max_drop, labels.get(name))
            if lost:
                return "budget", where + lost + told
    return "", ""


def _other_decisions(outputs: Mapping[str, OutputFigures], precision: str, aware: bool) -> str:
    """Say which output of a float file decides otherwise than near ties explain."""
    share = _TIES["aware" if aware else precision]
    for name, output in outputs.items():
        changed, decided = output.changed or 0, output.decided or 0
        if output.kind == "decisions" and changed > max(2, share * decided):
            return (
                f"{output.changed} of {output.decided} decisions at output `{name}` are not "
                f"the Keras model's, more than rounding to {precision} explains: "
            )
    return ""


def _doubts(
    row: ArtifactRow,
    measured: Measured,
    before: Mapping[str, KerasOutput],
    causes: useless_files.Causes | None,
    labels: Mapping[str, Sequence[str]],
) -> list[str]:
    outputs = measured.metrics.outputs
    flags = []
    if row.status != "failed" or row.stage == "budget":
        for name, output in outputs.items():
            where = f"at output `{name}`, " if len(outputs) > 1 else ""
            doubts = useless_files.doubtful(output, before.get(name), labels.get(name))
            flags += [where + text for text in doubts]
    if causes is None or row.stage == "verify":
        return flags
    if measured.metrics.sqnr < _LEAST_SQNR:
        flags += causes.lost_features(measured)
    flags += [text for text in (causes.scales(measured), causes.elsewhere(measured)) if text]
    return flags


def _loss(output: OutputFigures, max_drop: float) -> str:
    # Shares of a finite number of samples: a hair's breadth of float error must not decide.
    limit = max_drop + 1e-9
    for metric in (output.chosen or ())[:1]:
        lost = math.inf if metric.lost is None else metric.lost
        if lost <= limit:
            return ""
        side = "below" if metric.direction == "max" else "above"
        points = metric.direction == "max" and abs(metric.before) <= 1
        share = f"{100 * lost:.2f} " + ("points" if points else "%")
        value = f"{metric.value:.4g}" if math.isfinite(metric.value) else "not a number"
        return (
            f"{metric.name} {value} is {share} {side} the Keras model's "
            f"{metric.before:.4g}, more than max_drop allows ({100 * max_drop:g})"
        )
    if output.drop is not None and output.accuracy is not None:
        if output.drop <= limit:
            return ""
        return (
            f"accuracy {100 * output.accuracy:.2f} % is {100 * output.drop:.2f} points "
            f"below the Keras model, more than max_drop allows ({100 * max_drop:g})"
        )
    unclear = output.kind == "unknown"
    if output.agreement is not None and 1 - output.agreement > limit:
        return (
            f"it changes {100 * (1 - output.agreement):.2f} % of the Keras model's "
            f"decisions, more than max_drop allows ({100 * max_drop:g} %)"
            + ("; if these are no classes, pass labels or compile the model" if unclear else "")
        )
    if output.agreement is not None and not unclear:
        return ""
    if output.sqnr < _LEAST_SQNR:
        return (
            f"its outputs keep {output.sqnr:.1f} dB of signal over noise, less than "
            f"{_LEAST_SQNR:g} dB"
        )
    if output.variation is not None and output.variation < _LEAST_VARIATION:
        return (
            f"its outputs keep {output.variation:.1f} dB of what changes from sample to sample "
            f"over noise, less than {_LEAST_VARIATION:g} dB"
        )
    return ""


def _burden(output: OutputFigures, max_drop: float | None) -> float:
    # How much of what an output may lose it has lost: above 1 is too much.
    if not output.finite:
        return math.inf
    share = output.lost
    if share is None and output.agreement is not None:
        share = 1 - output.agreement
    burden = 0.0 if share is None else share / (max_drop or 0.01)
    if output.lost is None and output.kind in ("values", "unknown"):
        burden = max(burden, 10 ** ((_LEAST_SQNR - output.sqnr) / 20))
        if output.variation is not None:
            burden = max(burden, 10 ** ((_LEAST_VARIATION - output.variation) / 20))
    return burden


def _flags(row: ArtifactRow, measured: Measured, float32: Measured | None) -> list[str]:
    flags = []
    contents, low = measured.contents, measured.latency_low_ms or 0.0
    if contents.flex:
        flags.append(f"needs TensorFlow operators (Flex): {', '.join(contents.flex)}")
    if row.dense is not None:
        times = low / row.dense.latency_low_ms
        if times > SLOWER:
            flags.append(f"{times:.1f} times slower than with its zeros stored")
        elif row.dense.slowdown > SLOWER:
            flags.append(
                f"{row.dense.slowdown:.1f} times slower than with its zeros stored where XNNPACK "
                "is switched off"
            )
    if row.precision == "float32":
        return flags
    # How many weights there are of each width: bytes would make the float ones weigh more.
    counts = {int(bits): 8 * size / int(bits) for bits, size in contents.weight_bits.items()}
    left = counts.get(32, 0) / max(sum(counts.values()), 1)
    if left == 1:
        flags.append("quantization did nothing: all weights are still 32-bit floats")
    elif left > _FLOAT_WEIGHTS and row.precision != "mixed":
        flags.append(f"{100 * left:.0f} % of its weights are still 32-bit floats")
    if left < 1 and float32 is not None and measured.bytes >= 0.98 * float32.bytes:
        how = "hardly" if measured.bytes < float32.bytes else "not"
        flags.append(
            f"it is {how} smaller than float32 ({measured.bytes} against {float32.bytes} bytes)"
        )
    if row.precision in ("int8", "uint8") and contents.float_operators:
        flags.append(f"computes in float: {', '.join(contents.float_operators)}")
    times = low / float32.latency_low_ms if float32 and float32.latency_low_ms else 0.0
    if times > SLOWER:
        flags.append(f"{times:.1f} times slower than float32")
    return flags


def refusal(row: Measured, found: Measured | Failure, objective: str) -> str:
    """Say why a file keeps its zeros though it has a smaller form.

    Args:
        row: What was measured of the file itself.
        found: What was measured of the form without zeros.
        objective: What the user wants least of, `"size"` or `"latency"`.

    Returns:
        The reason; empty if the smaller form takes the file's place.
    """
    if isinstance(found, Failure):
        return f"LiteRT does not run them sparse ({found.error})"
    against = found.against
    # Not a number is not equal either.
    if against is None or not against.difference <= EQUAL:
        apart = float("nan") if against is None else against.difference
        return f"sparse, they answer differently (by {apart:.2g} of the largest output)"
    times = (found.latency_low_ms or 0.0) / (row.latency_low_ms or 1.0)
    if objective == "latency" and times > SLOWER:
        return f"sparse, they are {times:.1f} times slower"
    return ""


def order(objective: str) -> Callable[[ArtifactRow], list[float]]:
    """Return what the best file has least of, first what counts most.

    Args:
        objective: `"size"` or `"latency"`.
    """

    def costs(row: ArtifactRow) -> list[float]:
        found = row.measured
        size = math.inf if found is None else found.bytes
        time = math.inf if found is None or found.latency_ms is None else found.latency_ms
        return [size, time] if objective == "size" else [time, size]

    return costs


def best(rows: Sequence[ArtifactRow], objective: str) -> str | None:
    """Return the file name of the passed row with the least of the objective, if any passed."""
    passed = [row for row in rows if row.status == "passed"]
    return min(passed, key=order(objective)).file if passed else None


def choice(rows: Sequence[ArtifactRow], objective: str, targets: Sequence[str]) -> dict[str, Any]:
    """Return the part of a manifest that says which file to take.

    Args:
        rows: Of the manifest.
        objective: `"size"` or `"latency"`.
        targets: Names of runtimes, if only those count.

    Returns:
        `best`, and with targets `targets`, see `device_table.chosen`.
    """
    if not targets:
        return {"best": best(rows, objective)}
    everywhere, each = device_table.chosen(rows, targets, order(objective))
    return {"best": everywhere, "targets": each}
