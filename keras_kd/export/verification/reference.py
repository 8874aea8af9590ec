"""What the Keras model answered: the yardstick of every file, and what is measured against it.

`keras_answers.answer` makes a `Reference` by running the model, `reverify` one of stored samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.export.rows import Chosen as ChosenRow
from keras_kd.export.rows import KerasFigures, KerasOutput, Measured
from keras_kd.export.signature import Arrays, Signature
from keras_kd.export.verification import metrics
from keras_kd.export.verification.chosen_metrics import Chosen, lost, measure
from keras_kd.utils import archives

STORED_SAMPLES = 256
STORED_BYTES = 4_000_000
"""Samples that travel with the files, and the most bytes that their inputs may take."""


@dataclass(frozen=True)
class Reference:
    """The Keras model's answers on the evaluation data.

    Args:
        signature: Inputs and outputs of the model.
        inputs: Arrays by input name, `(samples, ...)`.
        outputs: The model's outputs by name.
        labels: Labels by output name; empty without labels.
        kinds: For each output, see `metrics.compare`.
        figures: What the model reaches and costs.
        weights: Weights by output name, see `counting.count`; an output may have none.
        chosen: The metrics that were asked for, by output name.
    """

    signature: Signature
    inputs: Arrays
    outputs: Arrays
    labels: Arrays
    kinds: dict[str, dict[str, Any]]
    figures: KerasFigures
    weights: Arrays = field(default_factory=dict)
    chosen: dict[str, list[Chosen]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(next(iter(self.inputs.values())))

    @property
    def stored(self) -> int:
        """How many samples travel with the files."""
        each = sum(array[:1].nbytes for array in self.inputs.values())
        answers = sum(array[:1].nbytes for array in self.outputs.values())
        most = max(1, archives.UNPACKED_FREELY // (2 * max(each + answers, 1)))
        return int(min(self.count, STORED_SAMPLES, max(8, STORED_BYTES // max(each, 1)), most))

    @property
    def shapes(self) -> list[list[int]]:
        """Shape of one sample of each input, batch included."""
        return [[1, *self.inputs[info.name].shape[1:]] for info in self.signature.inputs]

    def arrays(self) -> Arrays:
        """Return inputs `x<i>`, outputs `y<i>`, labels `t<i>`, weights `w<i>`, lists `g<i>`.

        Tensors go by number, since their names may hold characters that no file name may.
        """
        arrays = {f"x{i}": self.inputs[info.name] for i, info in enumerate(self.signature.inputs)}
        for i, info in enumerate(self.signature.outputs):
            arrays[f"y{i}"] = self.outputs[info.name]
            if info.name in self.labels:
                arrays[f"t{i}"] = self.labels[info.name]
            if info.name in self.weights:
                arrays[f"w{i}"] = self.weights[info.name]
            for chosen in self.chosen.get(info.name, ()):
                if chosen.groups is not None:
                    arrays[f"g{i}"] = chosen.groups
        return arrays


def judged(
    outputs: Arrays,
    labels: Arrays,
    kinds: dict[str, dict[str, Any]],
    weights: Arrays,
    chosen: dict[str, list[Chosen]],
) -> KerasFigures:
    """Measure a model's own answers against the labels.

    Args:
        outputs: By name.
        labels: By output name.
        kinds: See `metrics.compare`.
        weights: By output name.
        chosen: The metrics that were asked for.
    """
    found = metrics.compare(outputs, outputs, labels, kinds, weights, scores=True)
    values = measure(chosen, outputs, labels, weights)
    rows = {
        name: KerasOutput(row.accuracy, row.scores, values.get(name))
        for name, row in found.outputs.items()
    }
    return KerasFigures(found.accuracy, rows)


def with_chosen(measured: Measured, answers: Path, reference: Reference) -> tuple[Measured, str]:
    """Measure the user's metrics on a file: here, since functions do not travel to a worker.

    Args:
        measured: What else was measured of it.
        answers: Archive of the file's outputs, `y<i>`.
        reference: The Keras model's answers, and the metrics.

    Returns:
        The same with `chosen` at each output; and a note, if the metrics fail.
    """
    with np.load(answers) as arrays:
        outputs = {info.name: arrays[f"y{i}"] for i, info in enumerate(reference.signature.outputs)}
    if not measured.metrics.finite:
        return measured, ""
    note = ""
    try:
        found = measure(reference.chosen, outputs, reference.labels, reference.weights)
    except Exception as error:
        # It worked on the Keras model's answers; a function of the user's may fail on any others.
        note = f"the chosen metrics fail on its answers ({error})"
        found = {
            name: dict.fromkeys((each.name for each in chosen), math.nan)
            for name, chosen in reference.chosen.items()
        }
    figures = dict(measured.metrics.outputs)
    for name, chosen in reference.chosen.items():
        before = reference.figures.outputs[name].chosen or {}
        rows = tuple(
            ChosenRow(
                each.name,
                each.direction,
                before[each.name],
                found[name][each.name],
                lost(each.direction, before[each.name], found[name][each.name])
                if each.direction
                else None,
            )
            for each in chosen
        )
        figures[name] = replace(figures[name], chosen=rows)
    return replace(measured, metrics=replace(measured.metrics, outputs=figures)), note
