"""The process that converts and measures: `python -m keras_kd.export.worker FOLDER`.

`FOLDER/job.json` says what to do. Every task leaves `FOLDER/<id>.json`, and `FOLDER/current` names
the one at work, so that the parent knows which one a crash belongs to.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_kd.export import limits
from keras_kd.export.formats import registry
from keras_kd.export.formats.reasons import explain
from keras_kd.export.rows import TASKS, ConvertTask, from_json, to_json
from keras_kd.export.writing import disk_fault, hand_over


def main(folder: Path) -> None:
    """Do the job in a folder.

    Args:
        folder: Holds `job.json`; receives the results.
    """
    job = json.loads((folder / "job.json").read_text())
    # The caller's own modules may be needed to rebuild its layers; they come after everything else.
    sys.path.extend(part for part in job["sys_path"] if part not in sys.path)
    layers = job.get("layers", [])
    try:
        work = _worker(job)
    except Exception as error:
        traceback.print_exc()
        for task in job["tasks"]:
            failure = {"error": _reason(error, layers), "crashed": False, "started": False}
            hand_over(folder / f"{task['id']}.json", json.dumps(failure))
        return
    for task in job["tasks"]:
        (folder / "current").write_text(task["id"])
        began = time.perf_counter()
        try:
            result = work(task)
        except MemoryError:
            result = {"error": _no_memory(job), "crashed": False}
        except Exception as error:
            traceback.print_exc()
            result = {"error": _reason(error, layers), "crashed": False}
            full = disk_fault(error)
            if full is not None:
                result["errno"] = full
        result["seconds"] = time.perf_counter() - began
        hand_over(folder / f"{task['id']}.json", json.dumps(result))
        (folder / "current").unlink()


def _worker(job: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    registry.adopt(job.get("formats", {}))
    if job["kind"] == "convert":
        from keras_kd.export.convert import Converter

        converter = Converter(job)
        return lambda task: to_json(converter.convert(from_json(ConvertTask, task)))
    if job["kind"] == "bench":
        from keras_kd.export.verification.bench_file import bench_file

        return bench_file
    from keras_kd.export.verification.measurer import Measurer

    measurer = Measurer(job)
    return lambda task: to_json(measurer.do(from_json(TASKS[task["kind"]], task)))


def _no_memory(job: dict[str, Any]) -> str:
    most = job.get("memory")
    known = "" if most is None else f", of which {most / 1e9:.1f} GB were free"
    return f"it asks for more memory than this machine has{known}"


def _reason(error: Exception, layers: list[str]) -> str:
    told = explain(error, layers)
    if told is not None:
        return told[:600]
    # Others raise with pages of text; the line with "error:" is the one that says why.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [
        line for line in lines if "error:" in line and "Failures have been detected" not in line
    ]
    text = (telling or lines or [""])[0]
    return f"{type(error).__name__}: {text}"[:600]


if __name__ == "__main__":
    box = Path(sys.argv[1])
    limits.begin(json.loads((box / "job.json").read_text()).get("memory"))
    main(box)
