"""Where the benchmarks keep what they measured: `results/NAME.json`, and tables in the docs."""

import json
import os
import pathlib

import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"
DOCS = pathlib.Path(__file__).parent.parent / "docs"


def read(name):
    """What runs before this one have written, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def save(name, results):
    """Write results, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.with_suffix(".partial").write_text(json.dumps(results, indent=1) + "\n")
    os.replace(path.with_suffix(".partial"), path)


def put(page, name, body):
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a page of the docs."""
    path, begin, end = DOCS / page, f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} has no place for `{name}`: {begin} ... {end}")
    path.write_text(f"{before}{begin}\n\n{body}\n\n{end}{after}")


def spread(values, digits=1):
    """Mean ± standard deviation of what was measured, as tables show it."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    more = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{more}"
