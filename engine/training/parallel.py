"""How a task is spread over processes, and what is done to its blocks to save memory and time.

One process wraps nothing. `ddp` keeps a whole copy in every process and averages gradients while the backward pass
runs. `fsdp` (FSDP2, `fully_shard`) gives every process a share of each parameter, gradient and optimiser state: a block
is gathered when it is its turn, what is in no block once a forward pass. `hybrid` shards within a machine, where
connections are fast, and replicates between machines. All three divide a global batch alike, so losses differ only in
rounding.
"""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

from engine.errors import UserError
from engine.training import distributed
from engine.training.ema import ExponentialMovingAverage
from engine.training.task import Task, TrainerConfig


class ParallelTask:
    """A task on its device, wrapped as the trainer's settings say; parameters are final when this is made.

    Args:
        task: whole, on `device`, the same in every process.
        config: `parallel`, `precision`, `compile` and `checkpointing` count here.

    Raises:
        UserError: blocks are to be compiled or recomputed and the task names none, or the processes of `hybrid` are not
            equally many on every machine.
    """

    def __init__(self, task: Task, config: TrainerConfig, device: torch.device):
        self.task = task
        self.sharded = config.parallel != "ddp" and distributed.world_size() > 1
        self._spare = _without_weights(task) if self.sharded and distributed.is_main() else None
        prepare_blocks(task, config.compile, config.checkpointing)
        self._whole: list[nn.Parameter] = []
        self._losses: nn.Module = _Losses(task)
        if self.sharded:
            self._shard(_mesh(config.parallel, device), config.precision == "bf16")
        elif distributed.world_size() > 1:
            # Buffers are sent by the trainer: DDP would overwrite those that a stored result's backward needs.
            self._losses = DistributedDataParallel(
                self._losses,
                find_unused_parameters=len(task.parts()) > 1,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def _shard(self, mesh: DeviceMesh, bf16: bool) -> None:
        distributed.broadcast(p.detach() for p in self.task.parameters())  # as DDP does
        self._whole = [p for module in self.task.whole() for p in module.parameters()]
        # Weights travel in half precision; autocast decides about everything else, as it does without shards.
        half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in self.task.blocks():
            fully_shard(block, mesh=mesh, mp_policy=half if bf16 else MixedPrecisionPolicy())
        fully_shard(self._losses, mesh=mesh, ignored_params=set(self._whole))

    def losses(self, batch: dict[str, Any], part: str) -> dict[str, Tensor]:
        """`task(batch, part)`; of the results only `loss` is attached to the graph."""
        return self._losses(_Opaque(batch), part)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Forward and backward of one of a step's batches; gradients are averaged over processes in the `last` only."""
        if self.sharded:
            self._losses.set_requires_gradient_sync(last)
        waits = isinstance(self._losses, DistributedDataParallel) and not last
        with self._losses.no_sync() if waits else nullcontext():
            yield
        if last:
            for p in self._whole:
                if p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= distributed.world_size()

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients down to a common norm of at most `limit`; gives the norm that they had, over all shards."""
        if not self.sharded:
            return clip_grad_norm_(parameters, limit)
        kinds = [[p for p in group if p.grad is not None] for group in _by_kind(parameters).values()]
        norm = torch.stack([_full(get_total_norm([p.grad for p in kind])) for kind in kinds if kind]).norm()
        for kind in kinds:
            clip_grads_with_norm_(kind, limit, norm)
        return norm

    @contextmanager
    def evaluation_copy(self, ema: ExponentialMovingAverage) -> Iterator[Task | None]:
        """The task with averaged weights, in eval mode and without gradients, on rank 0; None on the others.

        All processes have to enter. With shards it is a copy, whose weights are gathered for the while.
        """
        full = {}
        if self.sharded:
            for name, p in self.task.named_parameters():  # all processes take part; rank 0 keeps what comes
                value = _full(ema.averages.get(name, p).detach())
                if self._spare is not None:
                    full[name] = value
        if not distributed.is_main():
            yield None
            return
        task = self._spare or self.task
        task.eval()
        try:
            with torch.no_grad(), _filled(task, full, self.task) if self.sharded else ema.swapped_in():
                yield task
        finally:
            self.task.train()


def adamw(parameters: Iterable[nn.Parameter], config: TrainerConfig) -> torch.optim.AdamW:
    """The optimiser of a part. Gains and biases are not decayed.

    Fused on CUDA; on processors fusing changes last digits, and golden losses with them.
    """
    parameters = list(parameters)
    groups = [
        {"params": group, "weight_decay": config.weight_decay if matrix else 0.0}
        for (matrix, _), group in _by_kind(parameters).items()
    ]
    fused = all(p.is_cuda for p in parameters)
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), fused=fused)


def _by_kind(parameters: Iterable[nn.Parameter]) -> dict[tuple[bool, bool], list[nn.Parameter]]:
    """(is a matrix, is sharded) -> parameters: kernels over many tensors take one kind at a time."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    for p in parameters:
        groups[p.ndim >= 2, isinstance(p, DTensor)].append(p)
    return groups


def _full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, sharded or not; every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _mesh(kind: str, device: torch.device) -> DeviceMesh:
    world = distributed.world_size()
    if kind == "fsdp":
        return init_device_mesh(device.type, (world,))
    node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % node:
        raise UserError(
            f"trainer.parallel=hybrid: {world} processes are not equally many on every machine ({node} on this one); "
            "give every machine the same --nproc_per_node or take trainer.parallel=fsdp"
        )
    return init_device_mesh(device.type, (world // node, node), mesh_dim_names=("replicate", "shard"))


def prepare_blocks(task: Task, compiled: bool, recomputed: bool) -> None:
    """Compile the task's blocks, and let the backward pass compute their activations again instead of keeping them."""
    blocks = task.blocks()
    for name, wanted in (("compile", compiled), ("checkpointing", recomputed)):
        if wanted and not blocks:
            raise UserError(f"trainer.{name}=true: {type(task).__name__} has no blocks to work on; set it to false")
    if compiled or recomputed:
        for block in blocks:
            block.forward = _training_forward(block, compiled, recomputed)


def _training_forward(block: nn.Module, compiled: bool, recomputed: bool) -> Callable[..., Any]:
    """Validation takes the plain forward: its lengths change all the time, and it keeps no activations."""
    plain = block.forward
    fast = torch.compile(plain) if compiled else plain

    def forward(*arguments: Any, **options: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return plain(*arguments, **options)
        if not recomputed:
            return fast(*arguments, **options)
        return checkpoint(fast, *arguments, use_reentrant=False, **options)

    return forward


def _without_weights(task: Task) -> Task:
    """A copy of a task that shares nothing with it, its parameters on the meta device."""
    empty = {id(p): _empty(p) for p in task.parameters()}
    return copy.deepcopy(task, empty)


def _empty(p: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)


@contextmanager
def _filled(spare: Task, weights: dict[str, Tensor], task: Task) -> Iterator[None]:
    """Within the block `spare` has these weights, and the buffers of `task`."""
    for mine, its in zip(spare.buffers(), task.buffers(), strict=True):
        mine.copy_(its)
    parameters = dict(spare.named_parameters())
    for name, p in parameters.items():
        torch.utils.swap_tensors(p, nn.Parameter(weights[name], requires_grad=p.requires_grad))
    try:
        yield
    finally:
        for p in parameters.values():
            torch.utils.swap_tensors(p, _empty(p))


class _Opaque:
    """Hides a batch from wrappers, which would pass on a copy: what one part stores in it would be lost to the next."""

    def __init__(self, batch: dict[str, Any]):
        self.batch = batch


class _Losses(nn.Module):
    """The task as DDP needs it: of what it returns, only `loss` may be attached to the graph."""

    def __init__(self, task: Task):
        super().__init__()
        self.task = task

    def forward(self, hidden: _Opaque, part: str) -> dict[str, Tensor]:
        losses = self.task(hidden.batch, part)
        return {k: v if k == "loss" else v.detach() for k, v in losses.items()}
