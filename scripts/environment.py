"""Check and set the environment of a command before PyTorch is imported.

Outside of the environment created by setup.sh, the command exits with a message.
"""

import os
import signal
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

# Ctrl-C while packages are imported ends the command without a traceback. `engine.errors.run_cli` then handles it.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
