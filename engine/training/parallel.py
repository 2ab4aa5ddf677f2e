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
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

from engine.errors import UserError
from engine.training import distributed
from engine.training.ema import ExponentialMovingAverage
from engine.training.settings import TrainerConfig
from engine.training.speed import recomputing
from engine.training.task import Task


class ParallelTask:
    """A task moved to its device and wrapped by DDP or FSDP. Do not add parameters afterwards.

    Args:
        task: the main process's counts; in the others its parameters may be on the meta device (see `build_once`).
        config: `parallel`, `precision`, `compile` and `checkpointing` count here.
        device: where the task then is, whole or this process's shards of it.
    """

    def __init__(self, task: Task, config: TrainerConfig, device: torch.device):
        self.task = task
        self.sharded = config.parallel != "ddp" and distributed.world_size() > 1
        self._spare = without_weights(task) if self.sharded else None
        if not self.sharded:
            task.to(device)
        prepare_blocks(task, config.compile, config.checkpointing)
        self._whole: list[nn.Parameter] = []
        self._losses: nn.Module = _Losses(task)
        if self.sharded:
            self._shard(_mesh(config.parallel, device), config.precision == "bf16", device)
        elif distributed.world_size() > 1:
            # Buffers are sent by the trainer: DDP would overwrite those that a stored result's backward needs.
            self._losses = _SteadyDDP(
                self._losses,
                find_unused_parameters=task.has_idle_parameters(),
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def _shard(self, mesh: DeviceMesh, bf16: bool, device: torch.device) -> None:
        """Give every process its shards of the main one's weights, one tensor at a time: no device holds all."""
        weights = {}
        for name, p in self.task.named_parameters():
            weights[name] = _empty(p)
            torch.utils.swap_tensors(p, weights[name])  # on the meta device, p stays the same object
        self._whole = [p for module in self.task.whole() for p in module.parameters()]
        # Weights travel in half precision; autocast decides about everything else, as it does without shards.
        half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in self.task.blocks():
            fully_shard(block, mesh=mesh, mp_policy=half if bf16 else MixedPrecisionPolicy())
        fully_shard(self._losses, mesh=mesh, ignored_params=set(self._whole))
        for name, p in list(self.task.named_parameters()):
            whole = weights.pop(name).detach()
            whole = whole.to(device) if distributed.is_main() else torch.empty(p.shape, dtype=p.dtype, device=device)
            dist.broadcast(whole, 0)
            if isinstance(p, DTensor):
                whole = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
            torch.utils.swap_tensors(p, nn.Parameter(whole, requires_grad=p.requires_grad))
        for module in self.task.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def losses(self, batch: dict[str, Any], part: str) -> dict[str, Tensor]:
        """Call `task(batch, part)`; of the results only `loss` is attached to the graph."""
        return self._losses(_Opaque(batch), part)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Surround forward and backward of a micro-batch; gradients are averaged over processes in the `last` only."""
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
        """Scale gradients down to a common norm of at most `limit`; return their norm before, over all shards."""
        parameters = [p for p in parameters if p.grad is not None]
        if not self.sharded or not parameters:
            return clip_grad_norm_(parameters, limit)
        kinds = list(_by_kind(parameters).values())
        norm = torch.stack([_full(get_total_norm([p.grad for p in kind])) for kind in kinds]).norm()
        for kind in kinds:
            clip_grads_with_norm_(kind, limit, norm)
        return norm

    @contextmanager
    def evaluation_copy(self, ema: ExponentialMovingAverage) -> Iterator[Task]:
        """Yield the task with averaged weights, in eval mode and without gradients.

        All processes have to enter. With shards it is a copy, whose weights are gathered for the while.
        """
        full = {}
        if self.sharded:
            full = {name: _full(ema.averages.get(name, p).detach()) for name, p in self.task.named_parameters()}
        task = self._spare or self.task
        task.eval()
        try:
            with torch.no_grad(), _filled(task, full, self.task) if self.sharded else ema.swapped_in():
                yield task
        finally:
            self.task.train()


def adamw(parameters: Iterable[nn.Parameter], config: TrainerConfig) -> torch.optim.AdamW:
    """Make the optimiser of a part. Gains and biases are not decayed.

    Fused on CUDA; on processors fusing changes last digits, and golden losses with them.
    """
    parameters = list(parameters)
    groups = [
        {"params": group, "weight_decay": config.weight_decay if matrix else 0.0}
        for (matrix, _), group in _by_kind(parameters).items()
    ]
    fused = all(p.is_cuda for p in parameters)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def clipping_groups(parameters: Iterable[nn.Parameter], apart: list[nn.Module]) -> list[list[nn.Parameter]]:
    """Group `parameters` that are clipped by a norm of their own: those of each module in `apart`, and the others."""
    left = {id(p): p for p in parameters}
    groups = [[left.pop(id(p)) for p in module.parameters() if id(p) in left] for module in apart]
    return [group for group in (list(left.values()), *groups) if group]


def begin_state(optimiser: torch.optim.Optimizer) -> None:
    """Make the state that AdamW makes at its first step, for a checkpoint to fill."""
    for p in (p for group in optimiser.param_groups for p in group["params"]):
        count = torch.zeros((), device=p.device)
        optimiser.state[p] = {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def update(optimiser: torch.optim.Optimizer, apply_step: Tensor) -> None:
    """Step an optimiser if `apply_step` () is true; fused optimisers read it on the device."""
    if optimiser.defaults["fused"]:
        optimiser.grad_scale, optimiser.found_inf = None, (~apply_step).float()
        optimiser.step()
    elif apply_step:
        optimiser.step()


def _by_kind(parameters: Iterable[nn.Parameter]) -> dict[tuple[bool, bool], list[nn.Parameter]]:
    """Group parameters by (is a matrix, is sharded): kernels over many tensors take one kind at a time."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    for p in parameters:
        groups[p.ndim >= 2, isinstance(p, DTensor)].append(p)
    return groups


def _full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, sharded or not; every process has to call this."""
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
    require_blocks(task, compiled, recomputed)
    for block in task.blocks() if compiled or recomputed else ():
        block.forward = _training_forward(block, compiled, recomputed)


def require_blocks(task: Task, compiled: bool, recomputed: bool) -> None:
    """Refuse to compile or recompute the blocks of a task that names none."""
    for name, wanted in (("compile", compiled), ("checkpointing", recomputed)):
        if wanted and not task.blocks():
            raise UserError(f"trainer.{name}=true: {type(task).__name__} has no blocks to work on; set it to false")


def _training_forward(block: nn.Module, compiled: bool, recomputed: bool) -> Callable[..., Any]:
    """Make a block's forward of training; validation, whose lengths vary, takes the plain one."""
    plain = block.forward
    fast = torch.compile(plain) if compiled else plain
    if recomputed:
        fast = partial(checkpoint, fast, use_reentrant=False, context_fn=recomputing)

    def forward(*arguments: Any, **options: Any) -> Any:
        return (fast if block.training and torch.is_grad_enabled() else plain)(*arguments, **options)

    return forward


def build_once(make: Callable[[], Task]) -> Task:
    """Call `make` in the main process; return its task, in the others with parameters on the meta device."""
    built: list[Task] = []

    def build() -> Task:
        built.append(make())
        return without_weights(built[0])

    empty = distributed.from_main(build)
    return built[0] if built else empty


def without_weights(task: Task) -> Task:
    """Copy a task; the copy shares nothing with it, and its parameters are on the meta device."""
    empty = {id(p): _empty(p) for p in task.parameters()}
    return copy.deepcopy(task, empty)


def _empty(p: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)


@contextmanager
def _filled(spare: Task, weights: dict[str, Tensor], task: Task) -> Iterator[None]:
    """Give `spare` these weights, and the buffers of `task`, within the block."""
    for mine, its in zip(spare.modules(), task.modules(), strict=True):
        for name, buffer in its._buffers.items():  # the copy was made before the task came to its device
            mine._buffers[name] = buffer.clone() if buffer is not None else None
    parameters = dict(spare.named_parameters())
    for name, p in parameters.items():
        torch.utils.swap_tensors(p, nn.Parameter(weights[name], requires_grad=p.requires_grad))
    try:
        yield
    finally:
        for p in parameters.values():
            torch.utils.swap_tensors(p, _empty(p))


class _SteadyDDP(DistributedDataParallel):
    """DDP whose buckets stay as they are.

    In which order three or more processes are added up depends on a gradient's place in its bucket, and PyTorch lays
    out the buckets anew after the first step: the first step of a run that resumes would differ in last digits from
    that of an unbroken one. Here they are laid out for good before it, the last parameters first, as the backward pass
    comes to them.
    """

    def __init__(self, module: nn.Module, **options: Any):
        super().__init__(module, **options)
        self.reducer._push_all_rebuilt_params()
        self.reducer._rebuild_buckets()  # with `find_unused_parameters` nothing happens, as these never change

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        parameters, sparse = super()._build_params_for_reducer()
        if not self.find_unused_parameters:  # those are reversed by PyTorch
            parameters, sparse = parameters[::-1], sparse[::-1]
        return parameters, sparse


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
