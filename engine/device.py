"""Which device a process computes on."""

from __future__ import annotations

import os

import torch

from engine.errors import UserError
from engine.settings import DEVICES, require_choice


def pick_device(name: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into this process's device; under torchrun each process gets a GPU of its own."""
    require_choice("device", name, DEVICES)
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but no CUDA device is available; use device=cpu or device=auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise UserError(f"process {local} of this machine has no GPU: {count} present; lower --nproc_per_node")
    return torch.device("cuda", local)
