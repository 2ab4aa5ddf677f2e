"""Worker processes that end with the process that started them."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1  # of Linux' prctl(2)


def end_with_parent() -> None:
    """Called in a worker: a kill of its parent, at which nothing can be tidied up, kills this process too (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C in this process during the block, and for ever in processes that it starts there."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
