"""Clips that training leaves out: one line each, with the count so far."""

from __future__ import annotations

import sys

from engine.errors import printable


class LeftOut:
    """Says which clips of a data set cannot be used, each once.

    Args:
        source: name of the data set in the lines. total: number of its clips.
    """

    def __init__(self, source: object, total: int) -> None:
        self.source, self.total = source, total
        self.keys: set[str] = set()

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, key: str, reason: object) -> None:
        if key not in self.keys:
            self.keys.add(key)
            count = f"{len(self)} of {self.total} so far"
            print(printable(f"{self.source}: clip {key} is left out ({count}): {reason}"), file=sys.stderr)
