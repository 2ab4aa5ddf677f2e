"""Stop requests: SIGTERM, SIGUSR1 and Ctrl-C end a run after a checkpoint, with exit code 75."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Exit code of a run that was asked to stop, has saved a checkpoint and can continue: EX_TEMPFAIL in sysexits.h.
REQUEUE = 75
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ONE_PRESS = 3.0  # seconds within which two Ctrl-C count as one, as torchrun forwards that of the terminal


@contextmanager
def stop_requests() -> Iterator[list[float]]:
    """Within the block, record the time of SIGTERM, SIGUSR1 and Ctrl-C in the yielded list instead of stopping.

    Repeated signals are ignored, as a scheduler and torchrun may both send one; only a second Ctrl-C after a pause
    interrupts immediately. Outside of the main thread, where Python does not allow handlers, nothing is changed.
    """
    times: list[float] = []

    def handle(number: int, _: object) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and times and now - times[0] > ONE_PRESS:
            raise KeyboardInterrupt
        times.append(now)

    in_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handle) for number in STOPPING} if in_main else {}
    try:
        yield times
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_in_worker(_: int) -> None:
    """Ignore stop signals in a data loading process, as torchrun signals all processes but batches are still needed."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
