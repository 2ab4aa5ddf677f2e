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
from dataclasses import dataclass, replace
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
from engine.training.speed import PEAKS, counter
from engine.training.task import Task


@dataclass(frozen=True)
class Card:
    """A GPU and its network, as data sheets state them.

    peak: dense bf16, TFLOP/s. memory: bytes. bandwidth: of the memory, bytes/s. link: bytes/s that a GPU sends to the
    others of its machine; network: to other machines, through an adapter of its own. machine: GPUs in one.
    """

    peak: float
    memory: float
    bandwidth: float
    link: float
    network: float
    machine: int = 8


CARDS = {
    "b200": Card(PEAKS["B200"], 180e9, 8.0e12, 900e9, 50e9),
    "h200": Card(PEAKS["H200"], 141e9, 4.8e12, 450e9, 50e9),
    "h100": Card(PEAKS["H100"], 80e9, 3.35e12, 450e9, 50e9),
    "a100": Card(PEAKS["A100"], 80e9, 2.04e12, 300e9, 25e9),
    "l40s": Card(PEAKS["L40S"], 48e9, 0.864e12, 32e9, 12.5e9),
}


@dataclass(frozen=True)
class Efficiency:
    """Shares of the stated rates that are reached, and the network's hidden part; assumptions, not measurements.

    compute: of the peak, in matrix products and attention. memory: of the bandwidth, in all other operators, each
    of which reads and writes its tensors (no fusion). network: of link and network. hidden: share of the computing time
    behind which exchange goes on. latency: seconds of a collective, for each doubling of its ranks. launch: seconds in
    which the host starts an operator; a step takes at least that for all of them. full: share of the memory that may be
    used.
    """

    compute: float = 0.5
    memory: float = 0.7
    network: float = 0.7
    hidden: float = 0.7
    latency: float = 10e-6
    launch: float = 5e-6
    full: float = 0.92


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


@dataclass(frozen=True)
class Plan:
    """What one way of spreading a recipe costs. Bytes and seconds of a process and step; see `Efficiency`."""

    parallel: str
    gpus: int
    samples: int  # of a process's batch
    memory: dict[str, float]
    fits: bool
    largest_batch: int
    sent: dict[str, float]
    flops: float
    compute_s: float
    memory_s: float
    host_s: float
    network_s: float
    step_s: float
    steps: float
    days: float


def network_seconds(measured: Measured, parallel: str, gpus: int, card: Card, rates: Efficiency) -> float:
    """Time of a step's collectives in rings: each rank sends (n - 1) / n of what it gathers or scatters, twice that of
    what it reduces to all. Rings over whole machines cross a machine's border once and share the adapters of all its
    GPUs. `hybrid` shards within a machine, and reduces between machines in as many rings at once as one has GPUs."""
    seconds = 0.0
    for kind, size in measured.sent.items():
        ranks = gpus
        if parallel == "hybrid":
            ranks = max(1, gpus // card.machine) if kind == "allreduce" else min(gpus, card.machine)
        if parallel == "hybrid" and kind == "allreduce":
            rate = card.network
        else:
            rate = card.link if ranks <= card.machine else min(card.link, card.machine * card.network)
        seconds += (2 if kind == "allreduce" else 1) * (ranks - 1) / ranks * size / (rate * rates.network)
        seconds += measured.calls[kind] * rates.latency * math.log2(max(2, ranks))
    return seconds


def plan(
    one: Measured, two: Measured, parallel: str, gpus: int, card: Card, samples: int, total: float,
    rates: Efficiency | None = None,
) -> Plan:  # fmt: skip
    """What steps of `samples` a process cost, from measurements with one sample and with two: activations and
    operations grow with the batch, what is exchanged does not.

    Args:
        total: samples of the whole run.
    """
    rates = rates or Efficiency()

    def at(first: float, second: float) -> float:
        return first + (second - first) * (samples - 1)

    memory = {name: at(one.memory[name], two.memory[name]) for name in one.memory}
    fixed = sum(memory.values()) - memory["activations"]
    room, each = card.memory * rates.full - fixed, two.memory["activations"] - one.memory["activations"]
    largest = int((room - one.memory["activations"]) // max(each, 1)) + 1
    compute = at(one.flops, two.flops) / (card.peak * 1e12 * rates.compute)
    moved = at(one.touched, two.touched) / (card.bandwidth * rates.memory)
    network = network_seconds(one, parallel, gpus, card, rates) if gpus > 1 else 0.0
    host = one.kernels * rates.launch  # as many for any batch
    busy = max(compute + moved, host)
    step = busy + max(0.0, network - rates.hidden * busy)
    steps = total / (samples * gpus)
    fits, days = sum(memory.values()) <= card.memory * rates.full, steps * step / 86_400
    flops, sent = at(one.flops, two.flops), dict(one.sent)
    costs = compute, moved, host, network, step, steps, days
    return Plan(parallel, gpus, samples, memory, fits, max(0, largest), sent, flops, *costs)


def spread(measured: Measured, parallel: str, before: int, now: int, machine: int) -> Measured:
    """A measurement on `before` processes as it would be on `now`: shards shrink, what travels does not change. (Rows
    that pad a shard, and what the optimiser reads and writes of its shards, are not counted anew.)"""
    if parallel == "ddp":
        return measured
    shards = [min(count, machine) if parallel == "hybrid" else count for count in (before, now)]
    memory = {k: v if k == "activations" else v * shards[0] // shards[1] for k, v in measured.memory.items()}
    return replace(measured, memory=memory)
