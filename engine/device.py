"""Which device a process computes on, how many there are, and how tensors come to it."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from engine.errors import UserError
from engine.settings import DEVICES, require_choice


def pick_device(name: str) -> torch.device:
    """Turn a setting `device` into this process's device; each process of a machine gets a GPU of its own.

    auto is the GPU, else the processor. mps, Apple's GPU, is taken where it is named: few of our networks were tried
    on it.
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
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise UserError(f"process {local} of this machine has no GPU: {count} present; lower --nproc_per_node")
    return torch.device("cuda", local)


def count_devices(devices: str, device: str, executor: str = "processes") -> int:
    """Return how many processes, each with a device of its own, the setting `devices` (a number, or all) asks for.

    With another executor it is 1: the devices are those of other machines, and this one may have none.
    """
    if executor != "processes":
        return 1
    kind = pick_device(device).type
    there = torch.cuda.device_count() if kind == "cuda" else 1
    count = there if devices == "all" else int(devices)
    if kind != "cpu" and count > there:
        raise UserError(f"devices={devices}, but {there} {kind} devices are here: use devices=all")
    return count


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move `x` to `device`, to CUDA through pinned memory: a copy from ordinary memory waits for the device.

    Compute what depends on lengths on the host and copy it: the other way round, the host would wait.
    """
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
