"""A validation spread over processes: each measures its share of the clips, and the figures come of all of them.

What processes measure is kept by clip, in the order of the clips, so that the figures do not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """What process `rank` of `count` measures: neighbouring items, the smaller shares first.

    The first process also measures what cannot be divided. It has an item if there is any: random draws then come after
    the same work as in a single process.
    """

    rank: int = 0
    count: int = 1

    def range(self, items: int) -> range:
        """The numbers of this process's items among `items`."""
        parts = min(self.count, items)
        if self.rank >= parts:
            return range(0)
        return range(self.rank * items // parts, (self.rank + 1) * items // parts)

    def pick(self, items: Sequence[T]) -> list[T]:
        return [items[i] for i in self.range(len(items))]

    @property
    def first(self) -> bool:
        return self.rank == 0


ALONE = Share()


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class ByClip:
    """A figure that all clips have together.

    Attributes:
        values: number of a clip -> what was measured of it.
        figure: of the values of all clips in their order; a function that pickle knows by name.
    """

    values: Mapping[int, Any]
    figure: Callable[[list[Any]], Any] = mean_of

    def __call__(self) -> Any:
        return self.figure([self.values[clip] for clip in sorted(self.values)])


def figures_of(shares: Sequence[Mapping[str, float | ByClip]]) -> dict[str, float]:
    """The figures of all shares. A figure of several values is their mean; one that no clip has is left out."""
    found: dict[str, float | ByClip] = {}
    for share in shares:
        for name, value in share.items():
            before = found.get(name)
            if isinstance(before, ByClip):
                value = ByClip({**before.values, **value.values}, value.figure)
            found[name] = value
    ready = {k: v() if isinstance(v, ByClip) else v for k, v in found.items() if not isinstance(v, ByClip) or v.values}
    return {name: float(np.mean(value)) for name, value in ready.items()}
