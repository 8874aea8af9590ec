#!/usr/bin/env bash
# onnxruntime 1.31.1 (PyPI, Linux x86), numpy 2.4.6, Python 3.11: `import onnxruntime`, without a
# session, starts a thread that reports to its makers, writes an identifier of the computer into
# ~/.cache/Microsoft/DeveloperTools/.onnxruntime and leaves a file `.ses` in the temporary folder.
# Telemetry was of Windows before. `onnxruntime.disable_telemetry_events()`, the switch of its API,
# can be called after the import only, when all of that is done; `ORT_DISABLE_TELEMETRY=1` in the
# environment prevents it. Continuous integration does not show it: with `CI` set nothing happens.
#
# Whoever builds images, runs tests that look for left-over files, or forks after the import gets
# these along: a fork has no such thread.
#
# Output seen:
#   import onnxruntime                    1 thread more, deviceid and .ses written
#   import and disable_telemetry_events() 1 thread more, deviceid and .ses written
#   ORT_DISABLE_TELEMETRY=1               0 threads more, nothing written
#   CI=true                               0 threads more, nothing written
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.31.1 numpy==2.4.6
cd "$folder"
# No proxy listens there: nothing leaves this computer for this demonstration.
export HTTPS_PROXY=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9
cat > run.py <<'PYTHON'
import os
import subprocess
import sys
import tempfile

CODE = """
import os, sys
import numpy
before = len(os.listdir("/proc/self/task"))
import onnxruntime
if len(sys.argv) > 1:
    onnxruntime.disable_telemetry_events()
# Whatever it needs to compute is started with a session.
print(len(os.listdir("/proc/self/task")) - before)
"""


def seen(*arguments, **variables):
    known = ("CI", "TF_BUILD", "GITHUB_ACTIONS", "GITLAB_CI", "ORT_DISABLE_TELEMETRY")
    own = {name: value for name, value in os.environ.items() if name not in known}
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as temporary:
        own.update(HOME=home, TMPDIR=temporary, **variables)
        own.pop("XDG_CACHE_HOME", None)
        result = subprocess.run(
            [sys.executable, "-c", CODE, *arguments],
            env=own,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        places = [*os.walk(home), *os.walk(temporary)]
        files = [name for _, _, names in places for name in names]
    written = sorted({"deviceid", ".ses"} & set(files), reverse=True)
    return int(result.stdout), " and ".join(written) or "nothing"


found = {
    "import onnxruntime": seen(),
    "import and disable_telemetry_events()": seen("disable"),
    "ORT_DISABLE_TELEMETRY=1": seen(ORT_DISABLE_TELEMETRY="1"),
    "CI=true": seen(CI="true"),
}
for name, (threads, written) in found.items():
    print(f"{name:37} {threads} thread{'' if threads == 1 else 's'} more, {written} written")
all_of_it = "deviceid and .ses"
wanted = [all_of_it, all_of_it, "nothing", "nothing"]
sys.exit([written for _, written in found.values()] != wanted)
PYTHON
venv/bin/python run.py
