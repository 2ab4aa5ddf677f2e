"""Data-parallel training, and per-block compilation and activation checkpointing.

A single process is not wrapped. `ddp` keeps a full copy in every process and averages gradients during the backward
pass. `fsdp` (FSDP2, `fully_shard`) shards parameters, gradients and optimiser states: each block is gathered when it is
used, and all other parameters once per forward pass. `hybrid` shards within a machine, where links are fast, and
replicates between machines. All three divide a global batch equally, so that losses only differ by rounding.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

from engine.errors import UserError
from engine.training import distributed
from engine.training.ema import ExponentialMovingAverage
from engine.training.settings import TrainerConfig
from engine.training.speed import recomputing
from engine.training.task import Task

# DDP rebuilds its buckets after the first step unless it searches for unused parameters. Sums over three or more
# processes would then differ by rounding between a resumed and an uninterrupted run.
warnings.filterwarnings("ignore", "find_unused_parameters=True was specified in DDP constructor")

LARGE_EMBEDDING = 2**24  # minimum number of weights of an embedding that is sharded separately


class ParallelTask:
    """A task on its device, wrapped by DDP or FSDP. Do not add parameters afterwards.

    Args:
        task: the task. Only the weights of the main process are used; in other processes, parameters may be on the meta
            device (see `build_once`).
        config: `parallel`, `precision`, `compile`, `checkpointing`, `reshard_after_forward` and `reduce_each` are used.
        device: device of the task, or of the shards of this process.

    Attributes:
        task: the task to train; when sharded, a copy whose parameters are DTensors.
    """

    def __init__(self, task: Task, config: TrainerConfig, device: torch.device):
        self.sharded = config.parallel != "ddp" and distributed.world_size() > 1
        self.reduce_each = config.reduce_each
        self.task = without_weights(task) if self.sharded else task.to(device)
        self._spare = without_weights(task) if self.sharded else None  # used by `evaluation_copy`
        prepare_blocks(self.task, config.compile, config.checkpointing)
        self._unsharded: list[nn.Parameter] = []
        self._losses: nn.Module = _Losses(self.task)
        if self.sharded:
            self._shard(config, device)
            _fill(self.task, task.state_dict() if distributed.is_main() else {}, device)
            self._unsharded = [p for module in self.task.unsharded_modules() for p in module.parameters()]
        elif distributed.world_size() > 1:
            # Buffers are broadcast by the trainer: DDP would overwrite buffers that are needed by a pending backward
            # pass.
            self._losses = DistributedDataParallel(
                self._losses, find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def _shard(self, config: TrainerConfig, device: torch.device) -> None:
        """Shard the blocks, the large embeddings, and all other parameters as one group."""
        mesh = _mesh(config.parallel, device)
        policy = MixedPrecisionPolicy()
        if config.precision == "bf16":
            # Weights are gathered in half precision; all other dtypes are set by autocast, as without sharding.
            policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        blocks = self.task.blocks()
        ignored = {p for module in self.task.unsharded_modules() for p in module.parameters()}
        for unit in blocks:
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
        for embedding in _large_embeddings(self.task, blocks):
            tied = _holders(self.task, embedding.weight)
            fully_shard(embedding, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
            for module, name in tied:  # sharding only replaces the weight of the embedding itself
                setattr(module, name, embedding.weight)
            ignored.add(embedding.weight)
        fully_shard(self._losses, mesh=mesh, ignored_params=ignored)

    def losses(
        self, batch: dict[str, Any], part: str, factors: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the losses of `task(batch, part)`, multiplied by `factors`. Only their sum, `loss`, is attached to the
        graph.

        Args:
            factors: factor () of each loss by name. Other losses are unchanged.
        """
        return self._losses(partial(self.task, batch, part), factors or {})

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Context for forward and backward of a micro-batch. Gradients are only averaged over processes in the `last`
        one.

        When sharded with `reduce_each`, they are averaged in every micro-batch.
        """
        if self.sharded:
            self._losses.set_requires_gradient_sync(last or self.reduce_each)
        waits = isinstance(self._losses, DistributedDataParallel) and not last
        with self._losses.no_sync() if waits else nullcontext():
            yield
        if last:
            for p in self._unsharded:
                if p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= distributed.world_size()

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Clip gradients to a total norm of at most `limit`. Return the total norm before clipping, over all shards."""
        parameters = [p for p in parameters if p.grad is not None]
        if not self.sharded or not parameters:
            return clip_grad_norm_(parameters, limit)
        kinds = list(_by_kind(parameters).values())
        norm = torch.stack([_full_tensor(get_total_norm([p.grad for p in kind])) for kind in kinds]).norm()
        for kind in kinds:
            clip_grads_with_norm_(kind, limit, norm)
        return norm

    @contextmanager
    def evaluation_copy(self, ema: ExponentialMovingAverage) -> Iterator[Task]:
        """Yield the task with averaged weights, in eval mode and without gradients.

        All processes must enter this context. When sharded, the task is a copy with the gathered weights.
        """
        task = self._spare or self.task
        task.eval()
        try:
            with torch.no_grad(), self._gathered(ema) if self.sharded else ema.swapped_in():
                yield task
        finally:
            self.task.train()

    @contextmanager
    def _gathered(self, ema: ExponentialMovingAverage) -> Iterator[None]:
        """Load the gathered weights and the buffers of the sharded task into the spare task within the block."""
        whole = {id(p): _full_tensor(ema.averages.get(name, p).detach()) for name, p in self.task.named_parameters()}
        weights = {name: whole[id(p)] for name, p in self.task.named_parameters(remove_duplicate=False)}
        empty = {name: p.detach() for name, p in self._spare.named_parameters(remove_duplicate=False)}
        for name, buffer in self.task.named_buffers(remove_duplicate=False):
            _set_buffer(self._spare, name, buffer.clone())
        self._spare.load_state_dict(weights, strict=False, assign=True)
        try:
            yield
        finally:
            self._spare.load_state_dict(empty, strict=False, assign=True)


def adamw(parameters: Iterable[nn.Parameter], config: TrainerConfig) -> torch.optim.AdamW:
    """Create the AdamW optimiser of a part. Gains and biases have no weight decay.

    The fused implementation is only used on CUDA, as it changes the rounding of golden losses on a CPU.
    """
    parameters = list(parameters)
    groups = [
        {"params": group, "weight_decay": config.weight_decay if matrix else 0.0}
        for (matrix, _), group in _by_kind(parameters).items()
    ]
    fused = all(p.is_cuda for p in parameters)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def clipping_groups(parameters: Iterable[nn.Parameter], apart: list[nn.Module]) -> list[list[nn.Parameter]]:
    """Group `parameters` for gradient clipping: those of each module in `apart`, and all others."""
    remaining = {id(p): p for p in parameters}
    groups = [[remaining.pop(id(p)) for p in module.parameters() if id(p) in remaining] for module in apart]
    return [group for group in (list(remaining.values()), *groups) if group]


def init_state(optimiser: torch.optim.Optimizer) -> None:
    """Initialise the state of AdamW as in its first step, so that a checkpoint can be loaded into it."""
    for p in (p for group in optimiser.param_groups for p in group["params"]):
        count = torch.zeros((), device=p.device)
        optimiser.state[p] = {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def _by_kind(parameters: Iterable[nn.Parameter]) -> dict[tuple[bool, bool], list[nn.Parameter]]:
    """Group parameters by (is a matrix, is sharded), as foreach kernels process one kind at a time."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    for p in parameters:
        groups[p.ndim >= 2, isinstance(p, DTensor)].append(p)
    return groups


def _full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor, gathered if it is sharded. All processes must call this function."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _mesh(kind: str, device: torch.device) -> DeviceMesh:
    world = distributed.world_size()
    if kind == "fsdp":
        return init_device_mesh(device.type, (world,))
    node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if len(counts := sorted(set(distributed.all_gather(node)))) > 1:
        distributed.fail(
            "trainer.parallel=hybrid requires equally many processes on every machine, "
            f"not {counts[0]} and {counts[-1]}: use the same --nproc_per_node everywhere, or trainer.parallel=fsdp"
        )
    return init_device_mesh(device.type, (world // node, node), mesh_dim_names=("replicate", "shard"))


def prepare_blocks(task: Task, compiled: bool, recomputed: bool) -> None:
    """Apply torch.compile and activation checkpointing to the blocks of a task."""
    require_blocks(task, compiled, recomputed)
    for block in task.blocks() if compiled or recomputed else ():
        block.forward = _training_forward(block, compiled, recomputed)


def require_blocks(task: Task, compiled: bool, recomputed: bool) -> None:
    """Raise UserError if compilation or checkpointing is requested for a task without blocks."""
    for name, wanted in (("compile", compiled), ("checkpointing", recomputed)):
        if wanted and not task.blocks():
            raise UserError(f"trainer.{name}=true: {type(task).__name__} has no blocks; set it to false")


def _training_forward(block: nn.Module, compiled: bool, recomputed: bool) -> Callable[..., Any]:
    """Return the training forward of a block. Validation, whose lengths vary, uses the original forward."""
    plain = block.forward
    fast = torch.compile(plain) if compiled else plain
    if recomputed:
        fast = partial(checkpoint, fast, use_reentrant=False, context_fn=recomputing)

    def forward(*arguments: Any, **options: Any) -> Any:
        return (fast if block.training and torch.is_grad_enabled() else plain)(*arguments, **options)

    return forward


def build_once(make: Callable[[], Task]) -> Task:
    """Call `make` and return its task. In all processes except the main one, parameters are on the meta device."""
    built: list[Task] = []

    def build() -> Task:
        built.append(make())
        return without_weights(built[0])

    empty = distributed.from_main(build)
    return built[0] if built else empty


def without_weights(task: Task) -> Task:
    """Return a copy of a task that shares nothing with it and has its parameters on the meta device."""
    empty = {id(p): _empty(p) for p in task.parameters()}
    return copy.deepcopy(task, empty)


def _empty(p: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)


def _large_embeddings(task: Task, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Return large embeddings outside of the blocks, which are gathered separately to overlap with computation."""
    taken = {id(module) for unit in (*blocks, *task.unsharded_modules()) for module in unit.modules()}
    embeddings = [module for module in task.modules() if isinstance(module, nn.Embedding) and id(module) not in taken]
    return [module for module in embeddings if module.weight.numel() >= LARGE_EMBEDDING]


def _holders(task: Task, p: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Return each module that directly owns `p`, and the parameter's name there."""
    modules = [(module, module.named_parameters(recurse=False, remove_duplicate=False)) for module in task.modules()]
    return [(module, name) for module, named in modules for name, each in named if each is p]


@torch.no_grad()
def _fill(task: Task, state: dict[str, Tensor], device: torch.device) -> None:
    """Materialise a task on the meta device. The `state` of the main process is broadcast tensor by tensor."""
    buffers = {name: buffer.to(device) for name, buffer in task.named_buffers(remove_duplicate=False)}
    task.to_empty(device=device)
    for name, buffer in buffers.items():
        _set_buffer(task, name, buffer)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(task, state, options=options)


def _set_buffer(task: Task, name: str, buffer: Tensor) -> None:
    module, _, last = name.rpartition(".")
    setattr(task.get_submodule(module), last, buffer)


class _Losses(nn.Module):
    """The module that DDP or FSDP wraps. Only the output `loss` is attached to the graph, as DDP requires.

    The input is the call of the task. FSDP would copy a batch, and values stored by one part would not reach the next.
    """

    def __init__(self, task: Task):
        super().__init__()
        self.task = task

    def forward(self, call: Callable[[], dict[str, Tensor]], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses = call()
        loss = losses["loss"]
        for name, factor in factors.items():
            if name in losses:
                loss = loss + (factor - 1) * losses[name]
                losses[name] = factor * losses[name]
        return {name: value.detach() for name, value in losses.items()} | {"loss": loss}
