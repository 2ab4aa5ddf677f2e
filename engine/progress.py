"""Progress of long work: a bar on a terminal, plain lines with rate and ETA everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_EVERY = 10.0  # seconds


def track(items: Iterable[T], total: int, unit: str) -> Iterator[T]:
    """The items themselves; what is done, its rate and the time left go to standard error."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, unit=unit)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last > LINE_EVERY or done == total:
            last, rate = now, done / max(now - start, 1e-9)
            left = timedelta(seconds=round((total - done) / rate))
            print(f"{done}/{total} {unit}, {rate:.2f} {unit}/s, {left} left", file=sys.stderr, flush=True)
