#!/usr/bin/env bash
# tflite-runtime 2.14.0, numpy 2.4.6: pip installs them together and the module is imported without
# a word. Only the first Interpreter fails, with an error about `_ARRAY_API` and an ImportError: the
# wheel was built for NumPy 1 and does not say so in its requirements. `numpy<2` mends it.
#
# Seen:
#   imported beside numpy 2.4.6
#   Interpreter: SystemError (or ImportError, AttributeError)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tflite-runtime==2.14.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2> /dev/null <<'PYTHON'
import base64
import sys

import numpy
import tflite_runtime.interpreter as tflite

print(f"imported beside numpy {numpy.__version__}")
# One RELU of one number.
model = base64.b64decode(
    """
GAAAAFRGTDMAAA4AFAAQAAwACAAAAAQADgAAABAAAAAcAAAA0AAAAAMAAAABAAAACAAAAAQABAAEAAAAAQAAABAAAAAM
ABQAEAAMAAgABAAMAAAAEAAAADwAAABAAAAARAAAAAEAAAAQAAAAAAAKAAwAAAAIAAQACgAAAAgAAAAMAAAAAQAAAAEA
AAABAAAAAAAAAAEAAAABAAAAAQAAAAAAAAACAAAAMAAAAAQAAADk////CAAAAAwAAAABAAAAeQAAAAEAAAABAAAADAAM
AAgAAAAAAAQADAAAAAgAAAAMAAAAAQAAAHgAAAABAAAAAQAAAAEAAAAQAAAADAAMAAsAAAAAAAQADAAAABMAAAAAAAAT
"""
)
try:
    tflite.Interpreter(model_content=model)
except (SystemError, ImportError, AttributeError) as error:
    print(f"Interpreter: {type(error).__name__}")
else:
    sys.exit("the behavior has changed")
PYTHON
