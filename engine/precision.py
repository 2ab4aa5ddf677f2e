"""How networks run in inference: in which precision (`precision=auto|fp32|bf16`), and compiled or not (`compile=true`).

In bfloat16, matrices and what they are multiplied with are in half precision: half of the bytes, and up to three times
the speed on a processor that multiplies such numbers. Sums over layers, log posteriors, draws and codecs stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from torch import nn

from engine.bounds import PRECISIONS, require_choice

CPU_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")  # by torch.cpu's names: x86, x86, ARM

M = TypeVar("M", bound=nn.Module)


def pick_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """`auto`, `fp32` or `bf16` -> type of the matrices; `auto` takes bfloat16 where the processor multiplies it itself.

    Raises:
        UserError: another word.
    """
    require_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        native = any(found.get(feature, False) for feature in CPU_FEATURES)
    return torch.bfloat16 if native else torch.float32


def convert_matrices(network: M, dtype: torch.dtype, without: Collection[str] = ()) -> M:
    """Convert the weights of linear layers in place, for use under `half_precision`; the result is not to be saved.

    Args:
        without: names of modules that stay as they are, with all that they hold.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and not set(name.split(".")) & set(without):
            layer.to(dtype)
    return network


def half_precision(device: torch.device | str, dtype: torch.dtype) -> torch.autocast:
    """Context in which networks with matrices of `dtype` run; does nothing in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def compile_step(device: torch.device | str) -> Callable[[Callable], Callable]:
    """Wraps the function of a step for `torch.compile`: the whole step is one graph; on CUDA it is launched as one."""
    mode = "reduce-overhead" if torch.device(device).type == "cuda" else None
    return lambda step: torch.compile(step, fullgraph=True, mode=mode)
