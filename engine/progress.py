"""Progress of long work: a bar in place on a terminal, plain lines with rate and ETA everywhere else; and clocks.

A command opens a `Progress`; what it calls names its stages with `stage`, without which nothing is shown or clocked.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import closing, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TypeVar

from tqdm import tqdm

from engine.errors import printable

T = TypeVar("T")
B = TypeVar("B", bound=Sized)
LINE_EVERY = 10.0  # seconds
LEAST = 1.0  # seconds between the last lines of two bars
_CURRENT: ContextVar[Progress | None] = ContextVar("progress", default=None)
current = _CURRENT.get  # the progress of the running command, or None


class Bar:
    """A count of steps up to `total` (None: unknown): call it after each step, `close` it at the end."""

    last_line = 0.0  # when any bar wrote one

    def __init__(self, total: int | None, unit: str, label: str = "") -> None:
        self.total, self.unit, self.label, self.count, self.reported = total, unit, label, 0, 0
        self.start = self.last = time.monotonic()
        self.tqdm = tqdm(total=total, unit=f" {unit}", desc=label or None, leave=False) if sys.stderr.isatty() else None

    def __call__(self, steps: int = 1) -> None:
        self.count += steps
        if self.tqdm is not None:
            self.tqdm.update(steps)
        elif time.monotonic() - self.last > LINE_EVERY:
            self._say()

    def close(self) -> None:
        if self.tqdm is not None:
            self.tqdm.close()
        elif self.count and self.reported != self.count and time.monotonic() - Bar.last_line > LEAST:
            self._say(closing=True)

    def _say(self, closing: bool = False) -> None:
        self.last = Bar.last_line = time.monotonic()
        self.reported, seconds = self.count, max(self.last - self.start, 1e-9)
        rate, of, duration = self.count / seconds, "", f", after {timedelta(seconds=round(seconds))}"
        if self.total and self.count < self.total and not closing:
            of, duration = f"/{self.total}", f", {timedelta(seconds=round((self.total - self.count) / rate))} left"
        label = f"{self.label}: " if self.label else ""
        print(f"{label}{self.count}{of} {self.unit}, {rate:.2f} {self.unit}/s{duration}", file=sys.stderr, flush=True)


class Progress:
    """The stages of a command, displayed and timed. Stages do not overlap: their seconds add up to the wall time.

    Args:
        started: `time.perf_counter()` when the command began; what passed since counts as "loading".

    Attributes:
        seconds: wall time of each stage.
        prefix: put before the labels of bars.
    """

    def __init__(self, started: float | None = None) -> None:
        self._last = time.perf_counter() if started is None else started
        self.seconds: Counter[str] = Counter()
        self.prefix, self.bar, self.stages = "", None, ["loading"]

    def __enter__(self) -> Progress:
        self.charge()
        self.stages[0], self._token = "other", _CURRENT.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.charge()
        _CURRENT.reset(self._token)

    def charge(self) -> float:
        """Count the seconds since the last call to the innermost stage; return those since the command began."""
        now = time.perf_counter()
        self.seconds[self.stages[-1]] += now - self._last
        self._last = now
        return sum(self.seconds.values())


@contextmanager
def stage(
    name: str, total: int | None = None, unit: str = "", label: str | None = None
) -> Iterator[Callable[..., None]]:
    """Time and display a part of a command's work, without its inner parts. Give a function to call after each step.

    Args:
        total, unit: of the steps; without a unit, only the label is displayed, and that on a terminal only.
        label: text to display, if not the name.
    """
    progress = current()
    if progress is None:
        yield lambda steps=1: None
        return
    progress.charge()
    progress.stages.append(name)
    outer, label = progress.bar, printable(f"{progress.prefix}{label or name}")
    bar: Bar | tqdm | None = None
    if unit:
        bar = progress.bar = Bar(total, unit, label)
    elif outer is None and sys.stderr.isatty():
        bar = tqdm(desc=f"{label} ...", bar_format="{desc}", leave=False)
    try:
        yield bar if unit else lambda steps=1: None
    finally:
        if bar is not None:
            bar.close()
        progress.bar = outer
        progress.charge()
        progress.stages.pop()


def watched(blocks: Iterable[B]) -> Iterator[B]:
    """Yield blocks of frames as they are read: timed as "reading", the frames counted by the open bar."""
    bar, source = getattr(current(), "bar", None), iter(blocks)
    if bar is not None:  # frames that are read again are counted from 0
        bar.count, bar.start = 0, time.monotonic()
        if bar.tqdm is not None:
            bar.tqdm.reset()
    while True:
        with stage("reading"):
            block = next(source, None)
        if block is None:
            return
        if bar is not None:
            bar(len(block))
        yield block


def track(items: Iterable[T], total: int, unit: str) -> Iterator[T]:
    """Yield the items; progress, rate and remaining time go to standard error."""
    with closing(Bar(total, unit)) as bar:
        for item in items:
            yield item
            bar()
