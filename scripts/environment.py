"""Check and set the environment of a command before PyTorch is imported.

Outside of the environment created by setup.sh, the command exits with a message.
"""

import os
import sys
from importlib.util import find_spec

if find_spec("torch") is None or find_spec("engine") is None:
    print(
        "error: the project's packages are not installed: run `bash scripts/setup.sh` once, then "
        "`source .venv/bin/activate`",
        file=sys.stderr,
    )
    sys.exit(2)

# Threads that spin while they wait for each other are ten times slower if another process uses one of their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
