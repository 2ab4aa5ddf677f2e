"""Exponential moving average of a module's trained parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from engine.training.distributed import local


class ExponentialMovingAverage:
    """Averages of all parameters that require gradients; buffers and frozen weights are not averaged.

    Of sharded parameters every process averages its own shards.

    Args:
        decay: weight of the old average. Update n uses min(decay, (1 + n) / (10 + n)), so that the random start is
            forgotten in short runs too. 0: the weights are their own average, and nothing is kept.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad and decay}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Take in the weights after update number `count` (from 0)."""
        decay = min(self.decay, (1 + count) / (10 + count))
        if self.averages:
            averages, weights = (map(local, each.values()) for each in (self.averages, self.parameters))
            torch._foreach_lerp_(list(averages), list(weights), 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the module, which must not be sharded, the averages as its weights within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():  # exchanges storages; nothing is copied
            parameter.data, self.averages[name] = self.averages[name], parameter.data
