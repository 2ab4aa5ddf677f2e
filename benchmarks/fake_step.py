"""Cost of a training step of one process, determined without a device.

The training program itself is run: task, AdamW, EMA. Weights, gradients and activations are fake tensors (shapes
without data). What depends on a batch alone (lengths, masks) is computed for real, as shapes depend on it.

Fake tensors are on the CPU: PyTorch runs no backward pass of CUDA tensors without a driver. Sizes and operations
are those of a GPU except for what autocast keeps in float32, where the two differ in a few operators.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_leaves

from benchmarks.common import Operators, nbytes
from engine.training.ema import ExponentialMovingAverage
from engine.training.parallel import adamw, clipping_groups, init_state, prepare_blocks
from engine.training.settings import TrainerConfig
from engine.training.speed import counter
from engine.training.task import Task


class HostOrFake(FakeTensorMode):
    """Operators on fake tensors, and `empty`, return fake tensors; operators on real tensors run normally."""

    def dispatch(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        fake = any(isinstance(x, FakeTensor) for x in tensors)
        if fake and func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default):
            indices: list[Tensor | None] = []
            for index in args[1]:  # a real mask tells how many are chosen
                is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
                indices += index.nonzero(as_tuple=True) if is_mask else [index]
            args = (args[0], indices, *args[2:])
        if fake or (not tensors and func._opname.startswith("empty")):
            return super().dispatch(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))


Size = tuple[int, int, bool]  # of a parameter: first dimension, product of the others, whether it is trained


@dataclass(frozen=True)
class Measured:
    """Measurements of one training step of a process.

    Attributes:
        memory: bytes by part.
        flops, touched, kernels: see `benchmarks.common.Operators`, without the optimiser.
        moved: bytes that the fused CUDA optimiser reads and writes.
        groups: shapes of the parameters that FSDP gathers together: one group per block, then the rest.
        whole: shapes of the parameters that are not sharded.
        beside: bytes of activations at the peak if all gradients are allocated from the beginning, as in DDP.
        sharded: the same if autocast keeps no copies of the weights of blocks, as in FSDP.
        sent, calls: bytes and calls by collective; {} in one process.
    """

    memory: dict[str, int]
    flops: float
    touched: float
    kernels: int
    moved: int
    groups: list[list[Size]] = field(default_factory=list)
    whole: list[Size] = field(default_factory=list)
    beside: float = 0
    sharded: float = 0
    sent: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


def measure(task: Task, config: TrainerConfig, batch: dict[str, Any]) -> Measured:
    """Measure a step of one process with one batch, on real or fake tensors."""
    with Operators() as seen:
        prepare_blocks(task.train(), config.compile, config.checkpointing)
        trained = {part: [p for p in m.parameters() if p.requires_grad] for part, m in task.parts().items()}
        optimisers = {part: adamw(ps, config) for part, ps in trained.items()}
        ema = ExponentialMovingAverage(task, config.ema_decay)
        for optimiser in optimisers.values():
            init_state(optimiser)
        for tensor in [*task.parameters(), *task.buffers()]:
            seen.hold(tensor)
        for p in (p for ps in trained.values() for p in ps):
            _reserve(p, seen)
        seen.begin()
        data = dict(batch)
        with counter() as flops:
            for part, optimiser in optimisers.items():
                torch.manual_seed(0)
                with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                    loss = task(data, part)["loss"]
                loss.backward()
                for group in clipping_groups(trained[part], task.separate_clip_groups()):
                    clip_grad_norm_([p for p in group if p.grad is not None], 1.0)
                touched = seen.touched
                kernels = seen.kernels
                optimiser.step()
                seen.touched = touched
                seen.kernels = kernels + len(optimiser.param_groups)
        gradients = nbytes(p.grad for ps in trained.values() for p in ps if p.grad is not None)
        ema.update(0)
        memory = {
            "weights": nbytes(task.parameters()),
            "gradients": gradients,
            "optimiser": nbytes(
                value for o in optimisers.values() for state in o.state.values() for value in state.values()
            ),
            "average": nbytes(ema.averages.values()),
        }
        beside = max(0, seen.peak - sum(memory.values()))
        memory["activations"] = max(0, seen.used - sum(memory.values()))
    whole = [p for module in task.unsharded_modules() for p in module.parameters()]
    groups = []
    grouped = {id(p) for p in whole}
    for module in (*task.blocks(), task):
        groups.append([_size(p) for p in module.parameters() if id(p) not in grouped])
        grouped |= {id(p) for p in module.parameters()}
    moved = gradients + 2 * (nbytes(p for ps in trained.values() for p in ps) + memory["optimiser"])
    counts = flops.get_total_flops(), seen.touched, seen.kernels, moved
    return Measured(memory, *counts, groups, [_size(p) for p in whole], beside, beside)


def _reserve(p: nn.Parameter, seen: Operators) -> None:
    """Reserve the memory of a gradient until it is computed."""
    room = torch.empty_like(p)
    seen.reserved += nbytes([room])

    def come(p: nn.Parameter) -> None:
        if p.grad is not room:
            seen.reserved -= nbytes([room])
            p.grad = room

    p.register_post_accumulate_grad_hook(come)


def _size(p: nn.Parameter) -> Size:
    first = p.shape[0] if p.ndim else 1
    return first, p.numel() // first, p.requires_grad


def measure_fake(
    make_task: Callable[[], Task],
    config: TrainerConfig,
    make_batch: Callable[[Task], dict[str, Any]],
    half: bool = False,
) -> Measured:
    """Run `measure` with fake weights.

    Args:
        make_task: creates the task from fake tensors, so that the model may have any size.
        make_batch: a real batch for the task, of a step's typical size.
        half: weights of blocks are in bfloat16, as FSDP gathers them: autocast then keeps no copies of them.
    """
    with (mode := HostOrFake(allow_non_fake_inputs=True)):
        task = make_task()
        gathered = {id(p) for block in task.blocks() for p in block.parameters()} if half else set()
        types = {id(p): torch.bfloat16 if id(p) in gathered else p.dtype for p in task.parameters()}
        memo: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty(p.shape, dtype=types[id(p)]), p.requires_grad) for p in task.parameters()
        }
        memo |= {id(b): torch.empty(b.shape, dtype=b.dtype) for b in task.buffers()}
    task = copy.deepcopy(task, memo)
    data = make_batch(task)
    with mode:
        return measure(task, config, data)
