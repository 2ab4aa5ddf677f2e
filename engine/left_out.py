"""Clips that training leaves out: one line each, with the count so far."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from engine.errors import printable


def leaving_out(source: object, total: int) -> Callable[[str, object], None]:
    """Return what says, once a clip, that a clip of the data set `source` of `total` clips cannot be used, and why."""
    return partial(_leave_out, set(), source, total)


def _leave_out(said: set[str], source: object, total: int, key: str, reason: object) -> None:
    if key not in said:
        said.add(key)
        count = f"{len(said)} of {total} so far"
        print(printable(f"{source}: clip {key} is left out ({count}): {reason}"), file=sys.stderr)
