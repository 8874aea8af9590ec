"""What a worker runs that was forked from a process in which TensorFlow is already imported."""

import os
from pathlib import Path

from keras_kd.export import worker


def main(box, log, environment):
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ.clear()
    os.environ.update(environment)
    worker.main(Path(box))


main(box, log, environment)  # noqa: F821  given by runpy.run_path
