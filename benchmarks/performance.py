"""All timing benchmarks, one process each, and the tables of docs/performance.md from them.

    python benchmarks/performance.py                # on a quiet machine, some forty minutes
    python benchmarks/performance.py --only step,cache
    python benchmarks/performance.py --tables       # the tables alone, from the results there are
    python benchmarks/performance.py --quick        # whether the scripts run; nothing is written

Each part writes `benchmarks/results/performance_PART.json` with the machine it ran on. The parts
`gpu` and `amx` run only when they are named, since they want another machine.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time

from records import put, read
from side_by_side import render

HERE = pathlib.Path(__file__).parent
PARTS = {
    "step": ["step.py"],
    "step_jax": ["step.py"],
    "step_torch": ["step.py"],
    "torch": ["torch_loop.py"],
    "settings": ["torch_loop.py", "--settings"],
    "cache": ["cache.py"],
    "job": ["job.py"],
    "answers": ["answers.py"],
    "growth": ["growth.py"],
    "memory": ["memory.py"],
}
BACKENDS = {"step_jax": "jax", "step_torch": "torch", "gpu": "jax"}
ELSEWHERE = {"gpu": ["gpu.py"], "amx": ["amx.py"]}


def run(part, quick):
    """Run one part; tells whether it came to its end."""
    script, *arguments = (PARTS | ELSEWHERE)[part]
    command = [sys.executable, str(HERE / script), *arguments, *(["--quick"] if quick else [])]
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ}
    if part in BACKENDS:
        environment["KERAS_BACKEND"] = BACKENDS[part]
    print(f"== {part}: {' '.join(command[1:])}", flush=True)
    began = time.perf_counter()
    code = subprocess.run(command, env=environment).returncode
    print(f"== {part}: {time.perf_counter() - began:.0f} s, exit code {code}\n", flush=True)
    return code == 0


def write_tables():
    """Put what was measured between the markers of the pages."""
    for part in [*PARTS, *ELSEWHERE]:
        result = read(f"performance_{part}")
        body = "Not measured yet."
        if result is not None:
            body = f"{render(result)}\n\n{_stamp(result)}"
            if part == "cache":
                put("scale.md", "rate", _rate(result))
        put("performance.md", part, body)


def _rate(result):
    """The sentence of docs/scale.md about the rate at which a cache is read."""
    rate = result["reading"]["records_per_second"]
    at_random, in_order = rate["cache"], rate["cache in order"]
    minutes = 14_197_122 / at_random / 60
    return (
        f"One process on {result['machine']['processor']} read {at_random / 1e6:.2f} million "
        f"top-100 records a second at random ({404 * at_random / 1e6:.0f} MB/s) and "
        f"{in_order / 1e6:.2f} million in the written order, from files that the system held in "
        f"memory ([how it was measured](performance.md#from-a-cache)). That is {minutes:.1f} "
        f"minutes of reading for an epoch of ImageNet-21k and {1e9 / at_random / 3600:.1f} hours "
        "for a billion images, spread over the epoch and over the processes that train."
    )


def _stamp(result):
    about = result["machine"]
    flags = ", ".join(about["flags"]) or "none of those looked for"
    versions = ", ".join(
        f"{name} {about[name]}"
        for name in ("keras", "tensorflow", "torch", "jax", "numpy")
        if name in about
    )
    return (
        f"*{result['date']}; {about['processor']}, {about['cores']} cores, flags: {flags}; load "
        f"{about['load at the start']} when it began; {versions}; backend {result['backend']}; "
        f"took {result['took_seconds']:.0f} s.*"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="parts, separated by commas")
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    parser.add_argument("--tables", action="store_true", help="write the tables alone")
    arguments = parser.parse_args()
    parts = arguments.only.split(",") if arguments.only else list(PARTS)
    unknown = sorted(set(parts) - set(PARTS | ELSEWHERE))
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}; there are {', '.join(PARTS | ELSEWHERE)}")
    failed = [] if arguments.tables else [part for part in parts if not run(part, arguments.quick)]
    if not arguments.quick:
        write_tables()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
