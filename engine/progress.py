"""Progress of long work on standard error: bars on a terminal, plain lines with rate and remaining time elsewhere.

A command opens `showing`; what it calls names its stages with `stage`, without which nothing is shown.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

from engine.errors import printable

T = TypeVar("T")
B = TypeVar("B", bound=Sized)
LINE = "{n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left"
LINE_EVERY = 10.0  # seconds


@dataclass
class Progress:
    """What a command shows. prefix: put before the labels of stages. bar: the open one."""

    prefix: str = ""
    bar: tqdm | None = None


_CURRENT: ContextVar[Progress | None] = ContextVar("progress", default=None)
current = _CURRENT.get  # the progress of the running command, or None


class _Lines:
    """The stream of bars where there is no terminal: of all that they write, a line every `LINE_EVERY` seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def write(self, text: str) -> None:
        text, now = text.strip(), time.monotonic()
        if text and now - self.last > LINE_EVERY:
            self.last = now
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Do nothing: lines are flushed."""


_LINES = _Lines()


class _Bar(tqdm):
    """A bar with a label; without a `unit`, the label alone."""

    monitor_interval = 0  # no thread that redraws

    def __init__(self, label: str, total: int | None, unit: str, items: Iterable[T] | None = None) -> None:
        settings = {"total": total, "unit": f" {unit}", "leave": False, "miniters": 1}
        if not unit:
            settings["bar_format"] = "{desc} ..."
        if not sys.stderr.isatty():
            line = "{desc}: " + LINE if label else LINE
            settings = {"bar_format": line, **settings, "file": _LINES, "position": 0}
        super().__init__(items, label, **settings)


@contextmanager
def showing() -> Iterator[Progress]:
    """Show the stages of the work in this block."""
    _LINES.last = time.monotonic()  # a command that ends within seconds writes no line
    token = _CURRENT.set(Progress())
    try:
        yield current()
    finally:
        _CURRENT.reset(token)


@contextmanager
def stage(label: str, total: int | None = None, unit: str = "") -> Iterator[Callable[..., object]]:
    """Show a part of a command's work. Give a function to call after each step.

    Args:
        label: text to show.
        total, unit: of the steps; without a unit, only the label is shown, and only if nothing else is.
    """
    progress = current()
    outer = progress and progress.bar
    if progress is None or (outer is not None and not unit):
        yield lambda steps=1: None
        return
    with _Bar(printable(progress.prefix + label), total, unit) as progress.bar:
        try:
            yield progress.bar.update
        finally:
            progress.bar = outer


def watched(blocks: Iterable[B]) -> Iterator[B]:
    """Yield blocks of frames as they are read, and count the frames in the open bar, if there is one."""
    bar = getattr(current(), "bar", None)
    if bar is not None:  # frames that are read again are counted from 0
        bar.reset()
    for block in blocks:
        if bar is not None:
            bar.update(len(block))
        yield block


def track(items: Iterable[T], total: int, unit: str) -> Iterator[T]:
    """Yield the items; progress, rate and remaining time go to standard error."""
    yield from _Bar("", total, unit, items)
