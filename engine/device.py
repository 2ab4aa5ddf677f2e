"""Which device a process computes on, how many there are, and how tensors come to it."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from engine.errors import UserError
from engine.settings import DEVICES, require_choice

_own_gpu: int | None = None  # see `use_gpu`


def use_gpu(number: int) -> None:
    """Let `pick_device` return another GPU in each worker process: the one of this number, counted around."""
    global _own_gpu
    count = torch.cuda.device_count()
    _own_gpu = number % count if count else None


def pick_device(name: str, index: int | None = None) -> torch.device:
    """Return the device of this process.

    Args:
        name: auto (the GPU if there is one, else the processor), cpu, cuda or mps. auto never chooses mps, Apple's GPU,
            on which few of our networks were tried.
        index: of the GPU; by default that of `use_gpu`, else torchrun's LOCAL_RANK, else 0.

    Raises:
        UserError: there is no such device.
    """
    require_choice("device", name, DEVICES)
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device=mps, but PyTorch has no Apple GPU here; use device=cpu or device=auto")
        return torch.device("mps")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but no CUDA device is available; use device=cpu or device=auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if index is None:
        index = _own_gpu
    if index is None:
        index = int(os.environ.get("LOCAL_RANK", 0))
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(f"process {index} of this machine has no GPU: {count} present; lower --nproc_per_node")
    return torch.device("cuda", index)


def count_devices(devices: str, device: str, executor: str = "processes") -> int:
    """Return the number of processes, each with its own device, that the setting `devices` (a number, or all) requests.

    With another executor it is 1: the devices are those of other machines, and this one may have none.
    """
    if executor != "processes":
        return 1
    kind = pick_device(device).type
    available = torch.cuda.device_count() if kind == "cuda" else 1
    count = available if devices == "all" else int(devices)
    if kind != "cpu" and count > available:
        raise UserError(f"devices={devices}, but this machine has {available} {kind} devices: use devices=all")
    return count


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move `x` to `device`, to CUDA through pinned memory: a copy from ordinary memory waits for the device.

    Compute what depends on lengths on the host and copy it: the other way round, the host would wait.
    """
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
