"""Exit with a message if the command is run outside of the environment created by setup.sh."""

import sys
from importlib.util import find_spec

if find_spec("torch") is None or find_spec("engine") is None:
    print(
        "error: the project's packages are not installed: run `bash scripts/setup.sh` once, then "
        "`source .venv/bin/activate`",
        file=sys.stderr,
    )
    sys.exit(2)
