"""Ends a command that is run outside of the environment that setup.sh makes, with a line that says what to do."""

import sys
from importlib.util import find_spec

if find_spec("torch") is None or find_spec("engine") is None:
    print(
        "error: this Python lacks the project's packages: bash scripts/setup.sh makes their environment, once, and "
        "source .venv/bin/activate uses it",
        file=sys.stderr,
    )
    sys.exit(2)
