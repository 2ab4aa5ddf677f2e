"""Stop requests: SIGTERM, SIGUSR1 and Ctrl-C end a run after a checkpoint, with exit code 75."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

REQUEUE = 75  # exit code of a run that was asked to stop, has saved and can go on; EX_TEMPFAIL in sysexits.h
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ONE_PRESS = 3.0  # seconds within which two Ctrl-C are one: the terminal's, and the same one handed on by torchrun


class StopRequest:
    """Within the block SIGTERM, SIGUSR1 and Ctrl-C do no more than set `asked`.

    Repeats are ignored, as a scheduler and torchrun may both tell a process the same thing; only a later second Ctrl-C
    interrupts at once. Outside the main thread, where Python allows no handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.asked and now - self._since > ONE_PRESS:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._since = True, now


def ignore_in_worker(_: int) -> None:
    """Ignore stop signals in a data loading process: torchrun signals all, and batches are needed to the end."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
