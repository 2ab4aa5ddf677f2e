"""Worker processes of an evaluation, which run measurements with one thread each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from engine.errors import UserError
from engine.processes import Lost, Processes, Work


class Calls(Work):
    """Runs calls (number, function, argument). A worker process uses one thread."""

    def __init__(self, number: int | None) -> None:
        if number is not None:
            torch.set_num_threads(1)

    def run(self, item: tuple[int, Callable, Any]) -> Any:
        _, function, argument = item
        return function(argument)


class Workers(Processes):
    """Worker processes that run measurements.

    Args:
        count: number of processes. 1 measures in the current process.
    """

    def __init__(self, count: int) -> None:
        super().__init__(count if count > 1 else 0, Calls)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """Yield `function(item)` for each item, in the order of the items."""
        results = {}
        number = 0
        for (at, *_), result in self.run((at, function, item) for at, item in enumerate(items)):
            if isinstance(result, Lost):
                raise UserError(
                    f"{result.reason}, probably out of memory: lower workers=; finished measurements are kept"
                )
            results[at] = result
            while number in results:
                yield results.pop(number)
                number += 1
