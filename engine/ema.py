"""Exponential moving average of a module's trained parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Averages of all parameters that require gradients; buffers and frozen weights are not averaged.

    Args:
        decay: weight of the old average. Update n uses min(decay, (1 + n) / (10 + n)), so that the random start is
            forgotten in short runs too. 0 makes the average equal to the weights.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Take in the weights after update number `count` (from 0)."""
        decay = min(self.decay, (1 + count) / (10 + count))
        weights = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the module has the averages as its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():  # exchanges storages; nothing is copied
            parameter.data, self.averages[name] = self.averages[name], parameter.data

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.averages)
