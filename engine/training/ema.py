"""Exponential moving average (EMA) of the trained parameters of a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from engine.training.distributed import local


class ExponentialMovingAverage:
    """EMA of all parameters that require gradients. Buffers and frozen parameters are not averaged.

    For sharded parameters, each process averages its local shards.

    Args:
        decay: weight of the previous average. Update n uses min(decay, (1 + n) / (10 + n)), so that the initial weights
            are forgotten in short runs, too. 0 disables averaging.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad and decay}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Update the averages after step `count` (from 0)."""
        decay = min(self.decay, (1 + count) / (10 + count))
        if self.averages:
            averages = [local(average) for average in self.averages.values()]
            weights = [local(parameter) for parameter in self.parameters.values()]
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Use the averages as weights of the module within the block. The module must not be sharded."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():  # swaps storages without copying
            parameter.data, self.averages[name] = self.averages[name], parameter.data
