"""What a training step costs on N processes, found in one process without a device.

The program that trains is run: task, `ParallelTask`, AdamW, average. Weights, gradients and activations are fake
tensors (shapes without data), the process group is PyTorch's fake one of N ranks, of which this process is the first.
What depends on a batch alone (lengths, masks) is computed for real, as shapes depend on it.

Fake tensors are the processor's: PyTorch runs no backward pass of CUDA tensors without a driver. Sizes and operations
are those of a GPU but for what autocast keeps in float32, where the two differ in a few operators.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from engine.training.ema import ExponentialMovingAverage, _local
from engine.training.parallel import ParallelTask, adamw, begin_state, clipping_groups
from engine.training.settings import TrainerConfig
from engine.training.speed import counter
from engine.training.task import Task


class HostOrFake(FakeTensorMode):
    """Fake tensors come of fake ones, and of `empty`; what is computed from real tensors alone is real."""

    def dispatch(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        fake = any(isinstance(x, FakeTensor) for x in tensors)
        if fake and func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default):
            args = (args[0], _places(args[1]), *args[2:])  # a real mask tells how many are chosen
        if fake or func.namespace == "c10d" or (not tensors and func._opname.startswith("empty")):
            return super().dispatch(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _places(indices: Any) -> list[Tensor | None]:
    """Indices with real masks replaced by the places that they choose."""
    places: list[Tensor | None] = []
    for index in indices:
        mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        places += index.nonzero(as_tuple=True) if mask else [index]
    return places


class Observer(TorchDispatchMode):
    """Watches operators: bytes that are alive, `sent` bytes and calls by collective, `kernels` (operators that are no
    views), and bytes `touched` by those of them that are no matrix products. Works on real tensors as well."""

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward", "scaled_dot_product")

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.touched = self.kernels = 0
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._sizes: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what is done to a shard comes here by itself
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in results:
            self.hold(x)
        name = func._opname
        if func.namespace == "c10d":
            kind = name.strip("_").replace("_base", "").replace("coalesced_", "")
            self.sent[kind] += max((x.numel() * x.element_size() for x in given), default=0)
            self.calls[kind] += 1
        else:
            before = {x.untyped_storage()._cdata for x in given}
            if name.endswith("_") or any(x.untyped_storage()._cdata not in before for x in results):  # not a view
                self.kernels += 1
                if not name.strip("_").startswith(self.PRODUCTS):
                    self.touched += sum(x.numel() * x.element_size() for x in [*given, *results])
        return out

    def hold(self, x: Tensor) -> None:
        """Count a tensor's memory as long as something refers to it."""
        storage = x.untyped_storage()
        size = storage.nbytes()
        if storage not in self._sizes:
            self._sizes[storage] = held = [0]
            weakref.finalize(storage, self._change, held, 0)
        self._change(self._sizes[storage], size)

    def _change(self, held: list[int], size: int) -> None:
        self.alive, held[0] = self.alive + size - held[0], size
        self.peak = max(self.peak, self.alive)

    def begin(self) -> None:
        """Count from now on; what is alive stays so."""
        self.peak, self.touched, self.kernels = self.alive, 0, 0
        self.sent.clear(), self.calls.clear()

    def __enter__(self) -> Observer:
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:  # how FSDP frees and makes room
            out = resize(storage, size)
            if storage in self._sizes:
                self._change(self._sizes[storage], size)
            return out

        torch.UntypedStorage.resize_ = resized
        self._propagate = propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def unseen(self: Any, schema: Any) -> Any:  # DTensor asks whole fake tensors for the shapes of shards
            with _disable_current_modes():
                return propagate(self, schema)

        ShardingPropagator._propagate_tensor_meta_non_cached = unseen
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        ShardingPropagator._propagate_tensor_meta_non_cached = self._propagate
        super().__exit__(*error)


@dataclass(frozen=True)
class Measured:
    """A process's step with one batch: bytes by part, bytes and calls by collective, operations; see `Observer`."""

    memory: dict[str, int]
    sent: dict[str, int]
    calls: dict[str, int]
    flops: int
    touched: int
    kernels: int


def nbytes(tensors: Any) -> int:
    """Of this process's shares."""
    return sum(t.numel() * t.element_size() for t in _local(tensors))


def measure(task: Task, config: TrainerConfig, batch: dict[str, Any], buckets: bool = False) -> Measured:
    """A step with one batch, on real or fake tensors, in the process group that there is.

    Args:
        buckets: take the place of DDP, which cannot hold fake tensors: gradients lie in buffers of their size, which
            are exchanged once.
    """
    with Observer() as seen:
        parallel = ParallelTask(task.train(), config, torch.device("cpu"), has_data=not _is_fake(task))
        trained = {part: [p for p in m.parameters() if p.requires_grad] for part, m in task.parts().items()}
        optimisers = {part: adamw(ps, config) for part, ps in trained.items()}
        ema = ExponentialMovingAverage(task, config.ema_decay)
        every = [p for ps in trained.values() for p in ps]
        if buckets:
            _exchange_as_ddp(every)
        for optimiser in optimisers.values():
            begin_state(optimiser)
        for tensor in [*_local(task.parameters()), *task.buffers()]:
            seen.hold(tensor)
        seen.begin()
        data = dict(batch)
        with counter() as flops:
            for part, optimiser in optimisers.items():
                torch.manual_seed(0)
                with (
                    parallel.micro_batch(last=True),
                    torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"),
                ):
                    loss = parallel.losses(data, part)["loss"]
                loss.backward()
                for group in clipping_groups(trained[part], task.clipped_apart()):
                    parallel.clip(group, 1.0)
                before = seen.touched, seen.kernels
                optimiser.step()
                # On CUDA the optimiser is fused: it reads all once, and writes all but gradients.
                moved = nbytes(p.grad for p in trained[part] if p.grad is not None)
                moved += 2 * nbytes([*trained[part], *_states(optimiser)])
                seen.touched, seen.kernels = before[0] + moved, before[1] + len(optimiser.param_groups)
        gradients = nbytes(p.grad for p in every if p.grad is not None)
        ema.update(0)
        memory = {
            "weights": nbytes(task.parameters()),
            "gradients": gradients,
            "optimiser": sum(nbytes(_states(o)) for o in optimisers.values()),
            "average": nbytes(ema.averages.values()),
        }
        memory["activations"] = max(0, seen.peak - sum(memory.values()))
    sent, calls = dict(seen.sent), dict(seen.calls)
    if buckets:
        sent["allreduce"] = sent.get("allreduce", 0) + nbytes(every)
        calls["allreduce"] = calls.get("allreduce", 0) + math.ceil(nbytes(every) / 25 / 2**20)  # DDP's buckets
    return Measured(memory, sent, calls, flops.get_total_flops(), seen.touched, seen.kernels)


def _states(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimiser.state.values() for value in state.values()]


def _is_fake(task: Task) -> bool:
    return any(isinstance(p, FakeTensor) for p in task.parameters())


def _exchange_as_ddp(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        place = torch.empty_like(p)

        def into(p: nn.Parameter, place: Tensor = place) -> None:
            place.copy_(p.grad)
            p.grad = place

        p.register_post_accumulate_grad_hook(into)


@contextmanager
def fake_processes(count: int, machine: int) -> Iterator[HostOrFake]:
    """Within the block this process is the first of `count`, `machine` of them on one machine, and weights are fake."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        with mock.patch.dict("os.environ", LOCAL_WORLD_SIZE=str(machine)):
            yield HostOrFake(allow_non_fake_inputs=True)
    finally:
        dist.destroy_process_group()


def without_data(task: Task, mode: HostOrFake) -> Task:
    """A copy with fake parameters and buffers."""
    with mode:
        fake = {id(p): nn.Parameter(torch.empty(p.shape), p.requires_grad) for p in task.parameters()}
        fake |= {id(b): torch.empty(b.shape, dtype=b.dtype) for b in task.buffers()}
    return copy.deepcopy(task, fake)


def measure_fake(
    make_task: Callable[[], Task], config: TrainerConfig, make_batch: Callable[[Task], dict[str, Any]], processes: int,
    machine: int,
) -> Measured:  # fmt: skip
    """`measure` on fake processes.

    Args:
        make_task: called where `empty` gives fake tensors, so that a model of any size can be made.
        make_batch: a real batch for the task, of a step's typical size.
    """
    with fake_processes(processes, min(machine, processes)) as mode:
        with mode:
            task = make_task()
        task = without_data(task, mode)
        data = make_batch(task)
        buckets = config.parallel == "ddp" and processes > 1
        if buckets:
            dist.destroy_process_group()
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
        with mode:
            return measure(task, config, data, buckets)
