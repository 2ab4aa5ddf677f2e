"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685) of linear layers, by PEFT.

W becomes W + scale * B A with B (out, rank) zero at the start; only A (rank, in) and B learn.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from engine.errors import UserError
from engine.optional import require

BASE, A, B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"  # PEFT's names


def add_lora(module: nn.Module, rank: int, alpha: float) -> float:
    """Give the linear layers of `module` low-rank updates of `rank`, the only parameters of it that learn.

    Layers that are no wider than `rank` on one side are left as they are: the update would hold more than they do.

    Returns:
        The factor of the updates, `alpha` / `rank`.
    """
    peft = require("peft", "PEFT", "finetune")
    layers = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and min(layer.weight.shape) > rank and not name.endswith("lm_head")
    ]
    if not layers:
        raise UserError(f"lora.rank={rank} is as wide as every layer of the model: give a lower rank")
    module.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers), module)
    return alpha / rank


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Add the low-rank updates of a state dict to the weights they update, under the original names."""
    out = {}
    for key, value in state.items():
        if key.endswith((A, B)):
            continue
        stem, inside, last = key.rpartition(BASE)
        if inside and last == "weight" and stem + A in state:
            value = value + scale * (state[stem + B].float() @ state[stem + A].float()).to(value.dtype)
        out[f"{stem}.{last}" if inside else key] = value
    return out
