"""Worker processes that end with the process that started them."""

from __future__ import annotations

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux' prctl(2)


def end_with_parent() -> None:
    """Called in a worker: a kill of its parent, at which nothing can be tidied up, kills this process too (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
