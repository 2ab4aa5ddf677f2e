"""Device selection, device count and transfers to a device."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from engine.errors import UserError
from engine.settings import DEVICES, require_choice

_own_gpu: int | None = None  # GPU index set by `use_gpu`


def use_gpu(number: int) -> None:
    """Set the GPU that `pick_device` returns in this worker process, modulo the number of GPUs."""
    global _own_gpu
    count = torch.cuda.device_count()
    _own_gpu = number % count if count else None


def as_device(device: torch.device | str) -> torch.device:
    """Return a device from its name: one of `pick_device`, or one of PyTorch, such as cuda:1.

    Raises:
        UserError: If there is no such kind of device, or none is available.
    """
    if isinstance(device, str) and device in DEVICES:
        return pick_device(device)
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device={device} is unknown; choose {', '.join(DEVICES)} or cuda:N") from error
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"device={device}: this machine has {count} CUDA devices")
    return found


def pick_device(name: str, index: int | None = None) -> torch.device:
    """Return the device of this process.

    Args:
        name: auto (the GPU if available, else the CPU), cpu, cuda or mps. auto never chooses mps, on which few networks
            have been tested.
        index: GPU index. Default: the one set by `use_gpu`, else torchrun's LOCAL_RANK, else 0.

    Raises:
        UserError: If the device does not exist.
    """
    require_choice("device", name, DEVICES)
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device=mps, but no Apple GPU is available to PyTorch; use device=cpu or device=auto")
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

    With another executor it is 1, as the devices are on other machines.
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
    """Copy `x` to `device`. Copies to CUDA go through pinned memory, as copies from pageable memory synchronise.

    Values that depend on lengths should be computed on the host and copied; the reverse would synchronise.
    """
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
