"""A hundred bad inputs and fifty kills at random points: `make faults`.

Every input must be refused by one clear error, with nothing written, changed or left at work; every
kill must lose nothing, leave nothing half-written, and be taken up by the next run. What was seen
is counted and printed; the exit code is 1 if anything was found wrong.

    KERAS_BACKEND=tensorflow python tests/faults/run.py --seed 13 --inputs 100 --kills 50

The same seed gives the same inputs; where a kill strikes depends on the machine as well. Each runs
in a fork of this process, which has done no more than import, so that a crash or a hang is one
finding and ends nothing else.
"""

import argparse
import collections
import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import bad_inputs
import kills

LONGEST = 120.0
"""Seconds after which a fork hangs."""


def forked(folder, work, *arguments):
    """Start `work(folder, *arguments)` in a fork; gives its process id.

    What it returns is written to `result.json`, what it says to `log`.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()
        (folder / "tmp").mkdir(exist_ok=True)
        # The workers of an export keep their scratch in here, too.
        os.environ["TMPDIR"] = str(folder / "tmp")
        tempfile.tempdir = None
        said = work(folder, *arguments)
        (folder / "result.json").write_text(json.dumps(said))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child, limit=LONGEST):
    """Wait for a fork; its exit code, or `None` if it had to be stopped."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def told(folder):
    """What a fork returned, or the end of what it said."""
    try:
        return json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        lines = (folder / "log").read_text(errors="replace").splitlines()
        return [f"it ended without a result: {' | '.join(lines[-3:])[-400:]}"]


def run_inputs(count, rng, root):
    """Try bad inputs; gives the findings."""
    counts, findings = collections.Counter(), []
    for i, (family, name, seed) in enumerate(bad_inputs.chosen(count, rng)):
        folder = root / f"input-{i}"
        folder.mkdir()
        child = forked(folder, bad_inputs.tried, family, name, seed)
        code = ended(child)
        problems = told(folder)
        if code is None:
            problems = [f"it hung for {LONGEST:.0f} s"]
        elif code < 0:
            problems = [f"the process crashed, {signal.Signals(-code).name}"]
        if kills.run_on(folder):
            problems.append("a process is left at work when the program has ended")
        counts[family, "wrong" if problems else "refused"] += 1
        findings += [f"{family}/{name} (seed {seed}): {problem}" for problem in problems]
        shutil.rmtree(folder, ignore_errors=True)
    return counts, findings


def run_kills(count, rng, root):
    """Kill work at random points; gives the findings."""
    counts, findings, before = collections.Counter(), [], {}
    for i, scenario in enumerate(kills.chosen(count, rng)):
        if scenario not in before:
            # Undisturbed, for the time that it takes and the result that must come out.
            folder = root / f"whole-{scenario}"
            folder.mkdir()
            kills.prepare(scenario, folder)
            began = time.monotonic()
            code = ended(forked(folder, kills.worked, scenario))
            before[scenario] = (time.monotonic() - began, folder)
            if code != 0:
                findings.append(f"{scenario}: it does not run undisturbed: {told(folder)}")
        seconds, whole = before[scenario]
        folder = root / f"kill-{i}"
        folder.mkdir()
        kills.prepare(scenario, folder)
        number = kills.signal_for(scenario, rng)
        after = rng.uniform(0, seconds)
        child = forked(folder, kills.worked, scenario)
        time.sleep(after)
        os.kill(child, number)
        code = ended(child)
        checked = forked(folder, kills.checked, scenario, str(whole), int(number), code)
        problems = told(folder) if ended(checked) is not None else ["the check hung"]
        struck = "was over before" if code == 0 else "struck"
        counts[scenario, struck] += 1
        where = f"{signal.Signals(number).name} after {after:.3f} of {seconds:.3f} s"
        findings += [f"{scenario} ({where}): {problem}" for problem in problems]
        shutil.rmtree(folder, ignore_errors=True)
    return counts, findings


def main():
    """Run both, print the counts, and exit with 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--inputs", type=int, default=100)
    parser.add_argument("--kills", type=int, default=50)
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="keras-kd-faults."))
    began = time.monotonic()
    findings = []
    try:
        for what, run, count in (
            ("kills", run_kills, given.kills),
            ("bad inputs", run_inputs, given.inputs),
        ):
            counts, found = run(count, random.Random(given.seed), root)
            findings += found
            print(f"{count} {what}:")
            for group in sorted({group for group, _ in counts}):
                parts = [
                    f"{number} {outcome}"
                    for (name, outcome), number in sorted(counts.items())
                    if name == group
                ]
                print(f"  {group:12} {', '.join(parts)}")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for finding in findings:
        print(f"WRONG: {finding}")
    print(
        f"seed {given.seed}: {len(findings)} found wrong, in {time.monotonic() - began:.0f} s.",
        flush=True,
    )
    # Keras's own threads are none of this program's.
    os._exit(1 if findings else 0)


if __name__ == "__main__":
    main()
