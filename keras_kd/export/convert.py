"""One model to many files, in the worker process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.export.formats import registry
from keras_kd.export.formats.base import Settings
from keras_kd.export.rows import Converted, ConvertTask
from keras_kd.export.source.source_model import Source


class Converter:
    """Converts one model to the artifacts asked for.

    Args:
        job: Job of the worker: see `Source`, and `calibration` (path or `None`), `allow_flex`,
            `opset`, `scratch`, `attempt`, and `about`, see `formats.base.Settings`.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        scratch = Path(job["scratch"]) / f"attempt-{job['attempt']}"
        scratch.mkdir(parents=True, exist_ok=True)
        self._source = Source(job, scratch)
        calibration = None
        if job["calibration"]:
            with np.load(job["calibration"]) as arrays:
                names = [info.name for info in self._source.signature.inputs]
                calibration = {name: arrays[f"x{i}"] for i, name in enumerate(names)}
        self._settings = Settings(
            calibration,
            job["about"],
            scratch,
            batch=job["batch"],
            opset=job["opset"],
            allow_flex=job["allow_flex"],
        )

    def convert(self, task: ConvertTask) -> Converted:
        """Write one artifact.

        Args:
            task: Which one.

        Returns:
            What was written, and what the report says about it.

        Raises:
            ValueError: If the format wrote other files than it said.
        """
        fmt = registry.get(task.format)
        made = fmt.convert(self._source, self._settings, task)
        folder = Path(task.path).parent
        missing = [name for name in made.files if not (folder / name).is_file()]
        if missing or not made.files or made.files[0] != Path(task.path).name:
            raise ValueError(
                f"the format `{fmt.name}` named the files {list(made.files)}, and "
                f"{missing or made.files} are not those that it was to write"
            )
        return made
