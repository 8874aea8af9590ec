"""What makes a file useless whatever it may lose, and what probably did it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_kd.export.formats import registry
from keras_kd.export.report.layer_report import LayerReport
from keras_kd.export.rows import (
    ArtifactRow,
    BadScale,
    Beyond,
    Chosen,
    KerasOutput,
    LayerRow,
    Measured,
    OutputFigures,
)
from keras_kd.export.signature import Arrays
from keras_kd.export.tensor_names import layer_of
from keras_kd.export.verification.metrics import STILL

LEAST_SIGNAL = 5.0
"""Decibels of signal over noise below which a file's answers are more noise than anything else."""

_CLEAR = 20.0
"""Decibels of signal over noise above which no layer is to be blamed."""

_HALF = 0.5
"""Share of what the Keras model can tell apart that a file must keep to be of use."""

_SURE = 0.01
"""Chance of as many rows lost, were they lost and won alike, below which it is no accident."""

_FEW = 10
"""Rows of a class below which its ranking is an accident."""


def useless(output: OutputFigures, before: KerasOutput | None, max_drop: float | None) -> str:
    """Say why an output is of no use, whatever accuracy it may lose; empty if it is.

    Args:
        output: Figures of the file at one output, see `metrics.compare`, perhaps with `chosen`.
        before: `scores` and `chosen` of the Keras model there.
        max_drop: What a file may lose of a chosen metric.
    """
    if output.kind == "decisions":
        return _other_decisions(output, max_drop)
    if output.constant:
        return (
            "its answers hardly change from sample to sample (less than "
            f"{100 * STILL:g} % of the standard deviation of the Keras model's)"
        ) + _skill_text(output, before)
    if output.kind == "values" and output.still:
        return f"{_units(output)} hardly change from sample to sample, while the Keras model's do"
    signal = _signal(output)
    if signal >= LEAST_SIGNAL:
        return ""
    text = f"its answers keep {signal:.1f} dB of signal over noise, less than {LEAST_SIGNAL:g} dB"
    chosen = output.chosen
    if chosen and max_drop is not None and _spared(chosen[0], max_drop):
        # The user's own measure says that what it needs is there.
        return ""
    if output.kind in ("values", "unknown"):
        return text
    kept = _kept(output, before)
    if kept is None:
        kept = output.kappa
    return "" if kept is not None and kept >= _HALF else text + _skill_text(output, before)


def _other_decisions(output: OutputFigures, max_drop: float | None) -> str:
    chosen = output.chosen
    if chosen and max_drop is not None and _spared(chosen[0], max_drop):
        return ""
    # Where the Keras model always decides the same there is no chance to compare with.
    alike = output.agreement if output.kappa is None else output.kappa
    # A few that change are no sign, however rare what they decide: so many are, by a sign test.
    enough = min(math.ceil(-math.log2(_SURE)), math.ceil((output.decided or 0) / 2))
    if alike is None or alike >= _HALF or (output.changed or 0) < enough:
        return ""
    text = f"{output.changed} of its {output.decided} decisions are not the Keras model's"
    if output.kappa is None:
        return text
    return f"{text}, which leaves {100 * max(alike, 0.0):.0f} % of what is beyond chance (kappa)"


def doubtful(
    output: OutputFigures, before: KerasOutput | None, labels: Sequence[str] | None
) -> list[str]:
    """Say what of a passed output deserves a second look.

    Args:
        output: Figures of the file at one output.
        before: `scores` of the Keras model there.
        labels: Names of the classes, if they are this output's.
    """
    flags = []
    now, then = output.scores or {}, _scores(before)
    for key, name, least in (
        ("auc", "AUC", 0.01),
        ("balanced_accuracy", "balanced accuracy", 0.05),
        ("spearman", "the rank correlation with the labels", 0.05),
    ):
        a, b = then.get(key), now.get(key)
        if a is not None and b is not None and a - b > least:
            flags.append(f"{name} falls from {a:.3f} to {b:.3f}")
    signal = _signal(output)
    if signal < LEAST_SIGNAL:
        flags.append(f"its answers keep {signal:.1f} dB of signal over noise alone")
    if output.kind != "values" and output.still:
        flags.append(
            f"{_units(output, labels)} hardly change from sample to sample, so nothing tells apart "
            "the rows of " + ("that class" if output.still_count == 1 else "those classes")
        )
    return flags


def class_loss(
    output: OutputFigures,
    before: KerasOutput | None,
    max_drop: float,
    labels: Sequence[str] | None,
) -> str:
    """Say which class or ranking was lost behind an accuracy that was kept; empty if none was.

    Args:
        output: Figures of the file at one output.
        before: `scores` of the Keras model there.
        max_drop: Accuracy that may be lost, 0..1.
        labels: Names of the classes, if they are this output's.
    """
    now, then = output.scores or {}, _scores(before)
    limit = max(5 * max_drop, 0.02)
    a, b = then.get("auc"), now.get("auc")
    supports = [n for n in (now.get("per_class") or {}).get("support", ()) if n > 0]
    enough = (
        len(supports) > 0
        and (min(supports) if len(supports) == 2 else float(np.median(supports))) >= _FEW
    )
    if a is not None and b is not None and a - b > limit and enough:
        return (
            f"AUC falls from {a:.3f} to {b:.3f}, by more than {limit:g}: it tells the classes "
            "apart less well, whatever its accuracy"
        )
    a, b = then.get("spearman"), now.get("spearman")
    if a is not None and b is not None and a > 0.2 and b < _HALF * a:
        # A few large answers may keep all decibels where all others have become one.
        return (
            f"the rank correlation with the labels falls from {a:.3f} to {b:.3f}: it no longer "
            "tells most rows apart. Where answers span several powers of ten, let the model answer "
            "logarithms"
        )
    rows, earlier = now.get("per_class"), then.get("per_class")
    if not rows or not earlier:
        return ""
    for k, support in enumerate(rows["support"]):
        was, is_now = earlier["recall"][k], rows["recall"][k]
        # A sign test of the rows lost on balance: rows that change both ways cancel out, which
        # errs on the side of no alarm.
        sure = 0.5 ** int(support * (was - is_now)) < _SURE
        if is_now < _HALF * was and was - is_now > limit and sure:
            return (
                f"class {_class(k, labels)} keeps {100 * is_now:.1f} % of its {support:g} rows, of "
                f"which the Keras model finds {100 * was:.1f} %"
            )
    return ""


def _scores(before: KerasOutput | None) -> Mapping[str, Any]:
    return {} if before is None or before.scores is None else before.scores


def _spared(metric: Chosen, max_drop: float) -> bool:
    return metric.lost is not None and metric.lost <= max_drop + 1e-9


def _signal(output: OutputFigures) -> float:
    values = [output.sqnr, output.variation, output.apart]
    return min(value for value in values if value is not None)


def _kept(output: OutputFigures, before: KerasOutput | None) -> float | None:
    """Share of what the Keras model tells apart, beyond chance, that the file still does."""
    now, then = output.scores or {}, _scores(before)
    shares = []
    for key, chance in (("auc", 0.5), ("balanced_accuracy", None)):
        if now.get(key) is None or then.get(key) is None:
            continue
        if chance is None:
            rows = then.get("per_class") or {}
            classes = sum(support > 0 for support in rows.get("support", ()))
            chance = 0.5 if output.kind != "classes" else 1 / max(classes, 1)
        if then[key] - chance > 0.05:
            shares.append((now[key] - chance) / (then[key] - chance))
    return min(shares) if shares else None


def _skill_text(output: OutputFigures, before: KerasOutput | None) -> str:
    now, then = output.scores or {}, _scores(before)
    if now.get("auc") is None or then.get("auc") is None:
        return ""
    return f"; AUC {then['auc']:.3f} becomes {now['auc']:.3f}"


def _class(k: int, labels: Sequence[str] | None) -> str:
    return f"`{labels[k]}`" if labels and k < len(labels) else str(k)


def _units(output: OutputFigures, labels: Sequence[str] | None = None) -> str:
    shown = ", ".join(_class(k, labels) for k in (output.still or ())[:5])
    more = (output.still_count or 0) - len((output.still or ())[:5])
    noun = "unit" if output.still_count == 1 else "units"
    return f"{noun} {shown}" + (f" and {more} more" if more else "")


class Causes:
    """Finds what probably took an output's signal in one file.

    Args:
        inputs: Evaluation inputs by name.
        outputs: The Keras model's outputs by name.
        layers: Names of the model's layers.
        noise: Rows of `layers.layer_noise` by format, of the int8 files.
    """

    def __init__(
        self,
        inputs: Arrays,
        outputs: Arrays,
        layers: Sequence[str],
        noise: Mapping[str, Sequence[LayerRow]],
    ) -> None:
        self._inputs = inputs
        self._outputs = outputs
        self._layers = set(layers)
        self._noise = noise

    def of(self, row: ArtifactRow, measured: Measured, output: str) -> str:
        """Return sentences on the likely cause and what to do, each behind a space.

        Args:
            row: The file's entry in the manifest.
            measured: What was measured of it.
            output: The output that lost its signal.
        """
        found = [self.scales(measured), self.instead(row, measured), *self.lost_features(measured)]
        found.append(self._units(measured, output))
        # Where all is well but for one unit, the layer at which most is lost is another story.
        figures = measured.metrics.outputs[output]
        if figures.kind == "decisions" or _signal(figures) < _CLEAR:
            found.append(self._layer(row))
        return "".join(f". {text}" for text in found if text)

    def broken(self, measured: Measured) -> str:
        """Return the scales that are not finite, as a reason; empty if there are none."""
        bad = [one for one in measured.scales.broken if not one.finite]
        if not bad:
            return ""
        where = ", ".join(f"`{one.tensor}`{self._of_layer(one)}" for one in bad[:3])
        return f"the scale of {where} is {bad[0].scale}, with which nothing can be computed"

    def float16(self, row: ArtifactRow, measured: Measured) -> str:
        """Return what float16 could not hold, as a reason; empty if nothing is known of it."""
        # Where a runtime computes with float16 constants in float32, as LiteRT does, results are.
        half = registry.get(row.format).computes_float16
        found = [one for one in measured.float16 or () if one.constant or half]
        if not found:
            return ""
        texts = []
        for one in found[:3]:
            what = "constant" if one.constant else "result"
            size = "at most" if one.vanishes else "up to"
            texts.append(f"the {what} `{one.tensor}`{self._of_layer(one)} is {size} {one.value}")
        return (
            f"beyond float16's range: {'; '.join(texts)}, and float16 ends at 65,504 and rounds "
            "what is below 3e-08 to 0. Bring inputs and targets to the size of 1 outside the "
            "model, or take float32, dynamic or int8"
        )

    def elsewhere(self, measured: Measured) -> str:
        """Say which results of a float16 file are infinite where float16 is computed with."""
        found = [one for one in measured.float16 or () if not one.constant]
        if not found:
            return ""
        one = found[0]
        return (
            f"`{one.tensor}`{self._of_layer(one)} is up to {one.value}, and float16 ends at "
            "65,504: it is right here, where float16 files are computed in float32, and infinite "
            "on GPUs and accelerators that compute in float16"
        )

    def scales(self, measured: Measured) -> str:
        """Say which scales are so small that products of them vanish; empty if none is."""
        bad = [one for one in measured.scales.broken if one.finite]
        if not bad:
            return ""
        where = ", ".join(f"`{one.tensor}`{self._of_layer(one)}" for one in bad[:3])
        return (
            f"The scale of {where} is {bad[0].scale}: it was 0 in all calibration samples, as "
            "the start state of a recurrent layer is, and kernels with a bias divide by it"
        )

    @staticmethod
    def instead(row: ArtifactRow, measured: Measured) -> str:
        """Return what to take in place of a file whose scales are broken; empty if none is."""
        if not measured.scales.broken:
            return ""
        return "Take int8" if row.precision == "int16x8" else "Take float16 or weight_int8"

    def _of_layer(self, one: BadScale | Beyond) -> str:
        # A constant may have lost its layer's name; what is computed from it has not.
        for name in (one.tensor, one.reader or ""):
            layer = layer_of(name, self._layers)
            if layer is not None:
                return "" if layer == name else f" of layer `{layer}`"
        return ""

    def lost_features(self, measured: Measured) -> list[str]:
        """Say which features of a quantized input lie within one step of its only scale."""
        texts = []
        for name, scale in measured.scales.inputs.items():
            array = self._inputs.get(name)
            if array is None or array.ndim < 2 or array.shape[-1] < 2 or array.dtype.kind != "f":
                continue
            flat = array.reshape(-1, array.shape[-1])
            reach = flat.max(axis=0).astype(np.float64) - flat.min(axis=0)
            lost = np.flatnonzero((reach > 0) & (reach < scale))
            if not len(lost):
                continue
            wide = int(reach.argmax())
            shown = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
            texts.append(
                f"Input `{name}` has one scale for all its features, {scale:.3g}, set by feature "
                f"{wide}, which spans {reach[wide]:.3g}: {len(lost)} of {flat.shape[1]} features "
                f"({shown}) lie within one step of it. Scale the features outside the model, give "
                f"those of another size an input of their own, or take `mixed` or float16"
            )
        return texts

    def _units(self, measured: Measured, output: str) -> str:
        figures = measured.metrics.outputs[output]
        if figures.constant or not figures.still or figures.kind != "values":
            return ""
        array = self._outputs[output]
        spread = np.std(array.reshape(-1, array.shape[-1]).astype(np.float64), axis=0)
        small = spread[figures.still[0]]
        return (
            f"Units of very different size share the one scale of output `{output}` (standard "
            f"deviations from {small:.3g} to {spread.max():.3g}): scale the targets to one size, "
            "or give each an output of its own"
        )

    def _layer(self, row: ArtifactRow) -> str:
        rows = self._noise.get(row.format, [])
        if row.precision not in ("int8", "uint8") or not rows:
            return ""
        worst = LayerReport({row.format: rows}).worst(row.format)
        if not worst:
            return ""
        level = next(one.sqnr or 0.0 for one in rows if one.layer == worst[0])
        return f"Most of the signal is lost at layer `{worst[0]}` ({level:.1f} dB behind it)"
