"""CUDA graphs for step functions: a single launch per step instead of thousands.

`GraphedStep` wraps a step function. On CUDA it captures the function once for each key (shapes, types, constants) and
replays the capture; on a CPU it calls the function directly. Capture needs no compiler and takes about as long as four
steps; with `compile=True` the function is compiled first and the compiled kernels are captured.

A graph reads and writes memory at fixed addresses. Each graph therefore has its own input tensors, into which arguments
are copied, and its outputs are overwritten by the next replay of any graph of the same memory pool. `GraphedStep`
returns copies, which callers may keep.

Requirements on a step function:
- It does not synchronise with the host, create tensors from host data, or use data-dependent shapes.
- It is idempotent, as it runs three times before it is captured. It may write into `fixed` tensors, such as a cache, at
  positions that arguments give; all other state is passed in and returned as tensors.
- Random numbers are passed as arguments.

A step keeps at most `LIMIT` graphs and drops the least recently used one. The graphs of a pool share the memory of
their intermediate tensors; the inputs of each graph are allocated separately.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

LIMIT = 128  # graphs per step: more than a service captures at start-up by default
WARM_UP = 3  # warm-up runs before a capture


class CudaGraphs:
    """Captures CUDA graphs on one device, in one memory pool.

    Replays of graphs of one pool must not overlap, so all of them must run on one stream. Threads may share an object
    of this class, as they share the default stream. Tests substitute a class that runs on a CPU and overwrites outputs
    as a replay would.

    Attributes:
        lock: held while inputs are copied, the graph is replayed and outputs are copied.
    """

    _lock = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.Lock()
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Capture `run`. Return a function that replays the graph and returns its outputs, which are valid until the
        next replay.
        """
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
    """A step function that is replayed as a CUDA graph on CUDA, and called directly on other devices.

    Args:
        step: a function that meets the requirements of this module. Its arguments and outputs are tensors and
            constants, optionally nested in lists, tuples, dicts and dataclasses.
        device: device of all tensors.
        compile: compile the function as one graph with `torch.compile`, which takes minutes when it first runs.
        backend: object that captures graphs. Default: `CudaGraphs` on CUDA, None on other devices. Steps that never run
            concurrently may share a backend.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        device: torch.device | str = "cpu",
        compile: bool = False,
        backend: CudaGraphs | None = None,
    ) -> None:
        self.step = torch.compile(step, fullgraph=True) if compile else step
        if compile:  # a function is compiled once per kind of input; beyond the limit, fullgraph=True is an error
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
        device = torch.device(device)
        self.backend = backend or (CudaGraphs(device) if device.type == "cuda" else None)
        self.graphs: OrderedDict[Hashable, tuple[list[Tensor], Any, Callable[[], Any]]] = OrderedDict()

    def __call__(self, *inputs: Any, fixed: Any = ()) -> Any:
        """Return the outputs of `step(*inputs, *fixed)`, which the caller may keep.

        Args:
            inputs: arguments that are copied into the graph's input tensors. Other shapes, dtypes or constants create
                another graph.
            fixed: tensors that a graph uses in place, such as a cache that the step writes. Other tensors create
                another graph. Weights of a module are also used in place.
        """
        if self.backend is None:
            return self.step(*inputs, *fixed)
        with self.backend.lock:
            return self._replay(inputs, fixed)

    def _replay(self, inputs: tuple[Any, ...], fixed: Any) -> Any:
        given: list[Tensor] = []
        key = _key(inputs, given), _key(fixed, None)
        if key not in self.graphs:
            # Inference tensors could not be written to outside of inference mode.
            with torch.inference_mode(False):
                own = [torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x) for x in given]
            rest = iter(own)
            arguments = map_tensors(lambda _: next(rest), inputs)
            # Keep a reference to `fixed`, so that its memory is not reused.
            self.graphs[key] = own, fixed, self.backend.capture(lambda: self.step(*arguments, *fixed))
            if len(self.graphs) > LIMIT:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        own, _, replay = self.graphs[key]
        if own:
            torch._foreach_copy_(own, given)
        return map_tensors(torch.clone, replay())


class GraphedSteps:
    """Creates a `GraphedStep` for each step function, all in one memory pool.

    Loops of a model that never run concurrently share one object, so that they reuse each other's graphs. A step
    function must be the same object each time: a module-level function, not a closure.
    """

    def __init__(
        self, device: torch.device | str = "cpu", compile: bool = False, backend: CudaGraphs | None = None
    ) -> None:
        self.backend = backend or (CudaGraphs(torch.device(device)) if torch.device(device).type == "cuda" else None)
        self.arguments = device, compile, self.backend
        self.steps: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a `GraphedStep` for a step function, or the function itself if there is no backend."""
        if step not in self.steps:
            graphed = GraphedStep(step, *self.arguments)
            self.steps[step] = graphed if self.backend is not None else graphed.step
        return self.steps[step]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return `value` with each nested tensor replaced by `function(tensor)`, in order. Containers are lists, tuples,
    dicts and dataclasses.
    """
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
    """Return a hashable key; arguments with equal keys share a graph.

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
