"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685) of a task's linear layers, by PEFT.

W becomes W + scale * B A with B (out, rank) zero at the start; only A (rank, in) and B learn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from engine.errors import UserError
from engine.optional import require

if TYPE_CHECKING:
    from engine.training.task import Task

BASE, A, B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"  # PEFT's names


def add_lora(task: Task, rank: int, alpha: float) -> None:
    """Give the linear layers of `task.adapted()` low-rank updates of `rank`, and freeze everything else in the task.

    Layers that are no wider than `rank` on one side are left as they are: the update would hold more than they do.

    Args:
        alpha: scale of the updates, times `rank`.

    Raises:
        UserError: `rank` is negative, the task has nothing to adapt, or PEFT is not installed.
    """
    module = task.adapted()
    if rank < 1:
        raise UserError(f"lora.rank={rank} must be 1 or more, or 0 for training all weights")
    if module is None:
        raise UserError(
            f"lora.rank={rank}: {type(task).__name__} has no low-rank training; use lora.rank=0 (all weights)"
        )
    peft = require("peft", "PEFT", "finetune")
    layers = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and min(layer.weight.shape) > rank and not name.endswith("lm_head")
    ]
    if not layers:
        raise UserError(f"lora.rank={rank} is as wide as every layer of {type(task).__name__}: give a lower rank")
    task.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers), module)
    task.lora_scale = alpha / rank


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state dict with low-rank updates added to the weights they update, under the names of before."""
    out = {}
    for key, value in state.items():
        if key.endswith((A, B)):
            continue
        stem, inside, last = key.rpartition(BASE)
        if inside and last == "weight" and stem + A in state:
            value = value + scale * (state[stem + B].float() @ state[stem + A].float()).to(value.dtype)
        out[f"{stem}.{last}" if inside else key] = value
    return out
