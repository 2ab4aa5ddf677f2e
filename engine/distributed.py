"""What the trainer needs of torch.distributed; every function also works in a single process."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import UserError

PATIENCE = timedelta(hours=4)  # the other ranks wait this long while rank 0 makes data or validates


def pick_device(wish: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> this process's device; under torchrun each process gets a GPU of its own.

    Raises:
        UserError: an unknown word, or `cuda` on a machine without a CUDA device.
    """
    if wish not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={wish} is unknown; choose auto, cpu or cuda")
    if wish == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but no CUDA device is available; use device=cpu or device=auto")
    if wish == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise UserError(f"process {local} of this machine has no GPU: {count} present; lower --nproc_per_node")
    return torch.device("cuda", local)


def start(wish: str) -> torch.device:
    """Join the process group that torchrun's environment describes, if there is one; gives this process's device."""
    device = pick_device(wish)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=PATIENCE, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=PATIENCE)
    return device


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def mean(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of every value over the processes; all must give the same keys."""
    packed = torch.tensor([float(values[key]) for key in sorted(values)], dtype=torch.float64, device=device)
    if dist.is_initialized() and len(values):
        dist.all_reduce(packed)
        packed /= world_size()
    means = dict(zip(sorted(values), packed.tolist(), strict=True))
    return {key: means[key] for key in values}


def any_true(flags: Tensor) -> list[bool]:
    """(n,) flags -> for each, whether it is set in any process. Waits for the device."""
    if dist.is_initialized():
        flags = flags.to(torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite every process's tensors with those of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def broadcast_object(value: object) -> object:
    """Rank 0's `value`, in every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]
