"""CUDA graphs of the steps of a loop: one launch per step in place of thousands.

`GraphedStep` wraps a step function. On CUDA it captures the function once for each key (shapes, types, constants) and
replays the capture; on a CPU it calls the function as it is. Capture needs no compiler and takes the time of four
steps; with `compile=True` the function is compiled first and the compiled kernels are captured.

A graph reads and writes memory at fixed addresses. So each graph has input tensors of its own, into which arguments are
copied, and its outputs are overwritten by the next replay of any graph of the same memory pool. `GraphedStep` returns
copies: callers may keep what they get. Nothing else in this repository has to know about lifetimes.

What a step function must keep to:
- It reads nothing on the host, makes no tensor from host data, and has no shape that depends on data.
- Called twice with equal arguments it leaves equal state: it runs three times before it is captured. It may write into
  `fixed` tensors, such as a cache, at positions that arguments give; other state goes in and out as tensors.
- Random numbers come in as arguments.

Bounds: a step keeps at most `LIMIT` graphs, of which the least recently used is dropped. A pool holds the intermediate
tensors of the largest of them, as they share memory; a graph's own inputs come on top.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

LIMIT = 32  # graphs of a step: those of all lengths and numbers of rows that a service captures when it starts
WARM_UP = 3  # runs before a capture, in which libraries set themselves up


class CudaGraphs:
    """Captures of one device, in one memory pool.

    Replays of graphs of one pool must not overlap: use an object of this class from one stream alone. Threads may share
    it, as they share the default stream. Tests put in another class, which runs on a CPU and destroys outputs as a card
    would.

    Attributes:
        lock: held from the copies of the inputs to those of the outputs.
    """

    _lock = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.Lock()
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Capture `run`; return what replays it and gives its outputs, which die at the next replay."""
        with self._lock, torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            stream = torch.cuda.Stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    run()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may continue to use the device.
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                outputs = run()

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay


class GraphedStep:
    """A step function that is replayed as a CUDA graph on CUDA, and called as it is elsewhere.

    Args:
        step: see the file's rules. Its arguments and outputs are tensors and constants, also in lists, tuples, dicts
            and dataclasses.
        device: of all tensors.
        compile: compile the function as one graph with `torch.compile`, which takes minutes when it first runs.
        backend: what captures; by default `CudaGraphs` on CUDA and nothing elsewhere. Steps that never run at the same
            time may share one.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        device: torch.device | str = "cpu",
        compile: bool = False,
        backend: CudaGraphs | None = None,
    ) -> None:
        self.step = torch.compile(step, fullgraph=True) if compile else step
        device = torch.device(device)
        self.backend = backend or (CudaGraphs(device) if device.type == "cuda" else None)
        self.graphs: OrderedDict[Hashable, tuple[list[Tensor], Any, Callable[[], Any]]] = OrderedDict()

    def __call__(self, *inputs: Any, fixed: Any = ()) -> Any:
        """Return the outputs of `step(*inputs, *fixed)`, which the caller may keep.

        Args:
            inputs: are copied into the graph's own tensors. Tensors of another shape or type, and other constants,
                make another graph.
            fixed: tensors that a graph uses where they lie, such as a cache that the step writes; others make another
                graph. Weights of a module are used where they lie, too.
        """
        if self.backend is None:
            return self.step(*inputs, *fixed)
        with self.backend.lock:
            return self._replay(inputs, fixed)

    def _replay(self, inputs: tuple[Any, ...], fixed: Any) -> Any:
        given: list[Tensor] = []
        key = _key(inputs, given), _key(fixed, None)
        if key not in self.graphs:
            # Not inference tensors, which cannot be written to outside of inference mode.
            with torch.inference_mode(False):
                own = [torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x) for x in given]
            rest = iter(own)
            arguments = map_tensors(lambda _: next(rest), inputs)
            # `fixed` is kept, so that its addresses are not given to other tensors.
            self.graphs[key] = own, fixed, self.backend.capture(lambda: self.step(*arguments, *fixed))
            if len(self.graphs) > LIMIT:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        own, _, replay = self.graphs[key]
        if own:
            torch._foreach_copy_(own, given)
        return map_tensors(torch.clone, replay())


class GraphedSteps:
    """A `GraphedStep` for each function that it is called with, all in one memory pool.

    A model's loops that never run at the same time share one, so that a loop finds the graphs of earlier ones. Such a
    function must be the same object each time: one of a module, not a closure.
    """

    def __init__(
        self, device: torch.device | str = "cpu", compile: bool = False, backend: CudaGraphs | None = None
    ) -> None:
        self.backend = backend or (CudaGraphs(torch.device(device)) if torch.device(device).type == "cuda" else None)
        self.arguments = device, compile, self.backend
        self.steps: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return what runs a step function: a `GraphedStep`, or without a backend the function itself."""
        if step not in self.steps:
            graphed = GraphedStep(step, *self.arguments)
            self.steps[step] = graphed if self.backend is not None else graphed.step
        return self.steps[step]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return `value` with each tensor in it replaced, in order; containers are lists, tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([map_tensors(function, part) for part in value])
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_tensors(function, getattr(value, f.name)) for f in fields(value)})
    return value


def _key(value: Any, tensors: list[Tensor] | None) -> Hashable:
    """Return what two arguments must have in common to share a graph.

    Their tensors are collected in `tensors`, in the order of `map_tensors`; None: they are distinguished by address.
    """
    if isinstance(value, Tensor):
        if tensors is not None:
            tensors.append(value)
        return value.shape, value.dtype, value.device, None if tensors is not None else value.data_ptr()
    if isinstance(value, dict):
        return tuple((key, _key(part, tensors)) for key, part in value.items())
    if isinstance(value, list | tuple):
        return tuple(_key(part, tensors) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), *(_key(getattr(value, f.name), tensors) for f in fields(value))
    return value
