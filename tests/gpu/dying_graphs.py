"""A stand-in for CUDA graphs on a CPU, whose outputs die as those of a card do."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.cuda_graph import map_tensors


class DyingOutputs:
    """A backend of `engine.cuda_graph.GraphedStep`: a replay begins by destroying the outputs of all before it.

    Attributes:
        captures: number of graphs.
        replays: number of replays.
    """

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0
        self.lock = threading.Lock()
        self.alive: list[weakref.ref[Tensor]] = []

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        self.captures += 1
        run()  # as the runs before a capture: state must not change by them
        run()

        def replay() -> Any:
            self.replays += 1
            for reference in self.alive:
                if (x := reference()) is not None:
                    x.fill_(float("nan") if x.is_floating_point() else False if x.dtype == torch.bool else -7)
            self.alive.clear()
            outputs = map_tensors(torch.clone, run())  # copies: an output may be an input as it is
            map_tensors(lambda x: self.alive.append(weakref.ref(x)), outputs)
            return outputs

        return replay
