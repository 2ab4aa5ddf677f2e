"""From the host to the device without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """Move `x` to `device`, to CUDA through pinned memory: a copy from ordinary memory waits for the device.

    What depends on lengths is computed on the host and sent: the other way round the host would wait.
    """
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
