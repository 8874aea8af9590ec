#!/usr/bin/env bash
# h5py 3.16.0, numpy 2.4.6, Linux.
#
# `h5py.File` takes an open Python file, as Keras gives it one while a `.keras` file is saved. What is
# raised while HDF5 calls that file does not come out as it was. A disk without room (here /dev/full,
# which answers every write so) ends as `AttributeError: '_io.FileIO' object has no attribute 'flush'`,
# though the object has one; by name the same place gives the OSError. Ctrl-C pressed while HDF5
# writes on closing ends as an AttributeError too, without a trace of the KeyboardInterrupt, so that
# what a program does on Ctrl-C is passed by.
#
# Output seen:
#   a full disk, by name: OSError; as an open file: AttributeError, after an OSError with errno 28
#   Ctrl-C in a write on closing: AttributeError, after nothing
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "h5py==3.16.0" "numpy==2.4.6"
"$folder/venv/bin/python" - <<'PYTHON'
import io
import signal

import h5py
import numpy as np


def told(file):
    """The error of writing an array, and what it followed."""
    try:
        with h5py.File(file, "w") as store:
            store["a"] = np.arange(8.0)
    except BaseException as error:
        return error, error.__context__
    raise AssertionError("no error")


class Interrupted(io.BytesIO):
    """A file in memory; the person presses Ctrl-C while it is written for the third time."""

    writes = 0

    def write(self, data):
        self.writes += 1
        if self.writes == 3:
            signal.raise_signal(signal.SIGINT)
        return super().write(data)


by_name, _ = told("/dev/full")
with open("/dev/full", "r+b", buffering=0) as file:
    opened, reason = told(file)
ended, pressed = told(Interrupted())
print(
    f"a full disk, by name: {type(by_name).__name__}; as an open file: {type(opened).__name__}, "
    f"after an {type(reason).__name__} with errno {reason.errno}"
)
print(f"Ctrl-C in a write on closing: {type(ended).__name__}, after {pressed or 'nothing'}")
assert isinstance(by_name, OSError)
assert isinstance(opened, AttributeError) and reason.errno == 28, "the behavior has changed"
assert isinstance(ended, AttributeError) and pressed is None, "the behavior has changed"
PYTHON
