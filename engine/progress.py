"""Progress reporting on standard error: bars on a terminal, otherwise lines with rate and remaining time.

A command opens `showing`, and the functions that it calls report stages with `stage`. Outside of `showing`, nothing is
shown. A user interface can pass `showing` a callback to use instead of bars.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from io import StringIO
from typing import TypeVar

from tqdm import tqdm

from engine.errors import printable

T = TypeVar("T")
B = TypeVar("B", bound=Sized)
LINE = "{n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left"
LINE_EVERY = 10.0  # seconds


Report = Callable[[int, int | None, str], object]  # arguments: finished steps, total number of steps if known, label


@dataclass
class Progress:
    """Progress display of a command.

    Attributes:
        prefix: prefix of stage labels.
        bar: the open bar.
        report: callback that is called instead of showing bars.
    """

    prefix: str = ""
    bar: _Bar | _Reported | None = None
    report: Report | None = None


_CURRENT: ContextVar[Progress | None] = ContextVar("progress", default=None)
current = _CURRENT.get  # the progress of the running command, or None


class _Bar(tqdm):
    """A progress bar with a label; without a `unit`, only the label is shown.

    Without a terminal, all bars together print a line every `LINE_EVERY` seconds.
    """

    monitor_interval = 0  # disable tqdm's monitor thread
    last_line = time.monotonic()

    def __init__(self, label: str, total: int | None, unit: str, items: Iterable[T] | None = None) -> None:
        settings = {"total": total, "unit": f" {unit}", "leave": False, "miniters": 1}
        if not unit:
            settings["bar_format"] = "{desc} ..."
        self.lines = not sys.stderr.isatty()
        if self.lines:
            line = "{desc}: " + LINE if label else LINE
            settings = {"bar_format": line, **settings, "file": StringIO()}
        super().__init__(items, label, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or print it as a line when due."""
        if self.total == 0:  # nothing to do
            return True
        if not self.lines:
            return super().display(msg, pos)
        if msg is None and time.monotonic() - _Bar.last_line > LINE_EVERY:
            _Bar.last_line = time.monotonic()
            print(str(self).strip(), file=sys.stderr, flush=True)
        return True


class _Reported:
    """Replacement of a bar that calls `report` when opened and after each step."""

    def __init__(self, report: Report, label: str, total: int | None) -> None:
        self.report = report
        self.label = label
        self.total = total
        self.done = 0

    def __enter__(self) -> _Reported:
        self.update(0)
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, steps: int = 1) -> None:
        self.done += steps
        self.report(self.done, self.total, self.label)

    def reset(self) -> None:
        self.done = 0


@contextmanager
def showing(report: Report | None = None) -> Iterator[Progress]:
    """Show the progress of the stages in this block. If `report` is given, call it instead."""
    _Bar.last_line = time.monotonic()  # commands that finish within seconds print no line
    token = _CURRENT.set(Progress(report=report))
    try:
        yield current()
    finally:
        _CURRENT.reset(token)


@contextmanager
def stage(label: str, total: int | None = None, unit: str = "") -> Iterator[Callable[..., object]]:
    """Report a stage of a command. Yield a function to call after each step.

    Without a `unit`, only the label is shown, and only if no other bar is open.
    """
    progress = current()
    outer = progress and progress.bar
    if progress is None or (outer is not None and not unit):
        yield lambda steps=1: None
        return
    label = printable(progress.prefix + label)
    bar = _Bar(label, total, unit) if progress.report is None else _Reported(progress.report, label, total)
    with bar as progress.bar:
        try:
            yield progress.bar.update
        finally:
            progress.bar = outer


def watched(blocks: Iterable[B]) -> Iterator[B]:
    """Yield blocks of frames and advance the open bar, if any, by the number of frames."""
    bar = getattr(current(), "bar", None)
    if bar is not None:  # restart at 0 when frames are read again
        bar.reset()
    for block in blocks:
        if bar is not None:
            bar.update(len(block))
        yield block


def progress_bar(items: Iterable[T], total: int, unit: str) -> Iterator[T]:
    """Yield the items and report progress, rate and remaining time on standard error."""
    yield from _Bar("", total, unit, items)
