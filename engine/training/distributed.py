"""Distributed helpers of the trainer. All functions also work in a single process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from engine.device import pick_device
from engine.errors import UserError

T = TypeVar("T")
_groups: list[dist.ProcessGroup] = []  # see `shutdown`
CPU_TIMEOUT = timedelta(hours=4)  # timeout for objects and checkpoints, as rank 0 may prepare data in the meantime
TIMEOUT = timedelta(minutes=10)  # timeout of tensor collectives, to detect hanging processes early
# NCCL's flight recorder dumps the last collectives when one of them times out.
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def init(name: str, run: str | Path | None = None) -> torch.device:
    """Join the process group described by torchrun's environment variables, if any. Return the device of this process.

    Args:
        name: device name, see `pick_device`.
        run: folder of the run. NCCL's flight recorder writes RUN/flight_recorder/rank0, rank1, ... when a collective
            times out.
    """
    # Avoids memory fragmentation by batches of many lengths. It is read when CUDA is initialised.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the earlier name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        for name, value in FLIGHT_RECORDER.items():
            os.environ.setdefault(name, value)
        if run is not None:
            dumps = Path(run).resolve() / "flight_recorder"
            dumps.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(dumps / "rank"))
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT, device_id=device if cuda else None)
        _groups.append(dist.group.WORLD)
    return device


def new_cpu_group() -> dist.ProcessGroup:
    """Create a gloo group of all processes with a long timeout, for CPU tensors. All processes must call this."""
    group = dist.new_group(backend="gloo", timeout=CPU_TIMEOUT)
    _groups.append(group)
    return group


def cpu_group() -> dist.ProcessGroup:
    """Return the group for objects and flags, which does not use the device. It is created on first use by all
    processes.
    """
    return _cpu_group_of(dist.group.WORLD)


@lru_cache(maxsize=1)
def _cpu_group_of(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """Create the CPU group beside a process group, once."""
    return new_cpu_group()


class AsyncFlags:
    """Flags that any process can set and that all processes see in the next call.

    The all-reduce is asynchronous and on CPU tensors, so that no device sync is needed.
    """

    def __init__(self) -> None:
        self._work: dist.Work | None = None
        self._flags = torch.zeros(0)

    def all_reduce(self, *flags: bool) -> list[bool]:
        """Start the all-reduce of `flags`. Return the flags that any process set in the previous call (in this call
        for a single process).
        """
        if not dist.is_initialized():
            return list(flags)
        previous = [False] * len(flags)
        if self._work:
            self._work.wait()
            previous = self._flags.bool().tolist()
        self._flags = torch.tensor(flags, dtype=torch.int32)
        self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=cpu_group(), async_op=True)
        return previous


def shutdown() -> None:
    """Destroy the process group.

    `_groups` keeps references to the groups until the interpreter exits. Freeing a gloo group joins its thread while
    holding the GIL, which this thread may need to free a tensor right after a collective (PyTorch 2.11).
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def local(tensor: Tensor) -> Tensor:
    """Return the local shard of a sharded tensor. Other tensors are returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def mean(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Average values over all processes, which must pass the same keys."""
    if not dist.is_initialized() or not values:
        return values
    packed = torch.tensor([values[key] for key in sorted(values)], dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    means = dict(zip(sorted(values), (packed / world_size()).tolist()))
    return {key: means[key] for key in values}


def all_reduce(values: Tensor) -> Tensor:
    """Sum `values` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_gather(value: object, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the `value` of every process, in order of rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group or cpu_group())
    return values


def fail(message: str) -> NoReturn:
    """End a run for a reason that is known to all processes. Rank 0 reports it, and the others exit with the same code.

    Raises:
        UserError: In the main process.
    """
    if is_main():
        raise UserError(message)
    raise SystemExit(2)


def restarted() -> bool:
    """Return whether torchrun or SLURM restarted this process after a failure or preemption."""
    return any(int(os.environ.get(name, 0)) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors of every process with those of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def from_main(action: Callable[[], T]) -> T:
    """Call `action` in the main process and return its result in all processes. A `UserError` ends all processes."""
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = action()
        except UserError as error:
            box[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(box, 0, group=cpu_group())
    if box[1] is not None:
        fail(box[1])
    return box[0]
