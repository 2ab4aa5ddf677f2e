"""The official LIA-X checkpoint (`lia-x.pt`, a flat state dict): the names of its tensors, and its sizes.

It also stores the constant low-pass kernels (`*.kernel`), and keeps an axis of one in front of modulated weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.official import numbered, rename_all, sizes_of
from engine.torch_files import read_checkpoint

FILE = "lia-x.pt"
WIDTH = 64  # channels at full size before `scale`, the same in every published network
PARTS = {
    "conv_1": "grow",
    "conv_2": "flow_blocks",
    "conv_2_up": "carry",
    "conv_2_rgb": "refine_blocks",
    "flow": "to_flow",
    "rgb": "to_rgb",
}
RULES = (
    # A layer is a sequence there, and the bias may belong to its activation.
    (r"\.\d+\.(weight|bias)$", r".\1"),
    (r"activate\.", ""),
    (r"^enc\.enc_2r\.block1\.", "encoder.stem."),
    (r"^enc\.enc_2r\.block8\.", "encoder.head."),
    (r"^enc\.enc_2r\.block(\d+)\.0\.", lambda found: f"encoder.blocks.{int(found[1]) - 2}."),
    (r"^enc\.enc_2r\.block_512\.", "encoder.blocks.last."),
    (r"^enc\.enc_r2t\.", "encoder.to_motion."),
    (r"^dec\.direction\.", "decoder.directions."),
    (r"^dec\.input\.input", "decoder.constant"),
    (r"^dec\.conv1\.", "decoder.first."),
    # The first level is called 512 there and the others 2, 3, ...
    (
        r"^dec\.(conv|flow|rgb)(?:_512|(\d+))(|_1|_2|_2_up|_2_rgb)\.",
        lambda found: f"decoder.levels.{int(found[2] or 1) - 1}.{PARTS.get(found[1] + found[3])}.",
    ),
)


def read_official(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return the fields of `LiaXConfig` and the state dict with renamed keys of an upstream checkpoint.

    Args:
        path: the checkpoint, or a folder that contains it. Returns None if there is none.
    """
    path = path / FILE if (path / FILE).is_file() else path
    if not path.is_file():
        return None
    state = read_checkpoint(path)
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not a flat state dict: use the official {FILE}")
    ours = our_state(state)
    return config_of(ours), ours


def config_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of `LiaXConfig` that match the shapes of an upstream state dict with renamed keys.

    The shapes determine only the products of widths and `scale`; `WIDTH` is assumed as the unscaled width.
    """
    with sizes_of("a LIA-X checkpoint"):
        style_dim, motion_dim = state["decoder.directions.weight"].shape
        first = state["encoder.stem.weight"].shape[0]
        _, widest, base, _ = state["decoder.constant"].shape
    scale = max(1, first // WIDTH)
    return {
        "style_dim": style_dim // scale,
        "motion_dim": motion_dim,
        "scale": scale,
        "size": base << len(numbered(state, "encoder.blocks.{}.conv1.weight")),
        "width": first // scale,
        "max_width": widest // scale,
        "depth": len(numbered(state, "decoder.levels.0.flow_blocks.{}.gamma")),
    }


def our_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of an official state dict, and convert it to float32. Unknown keys are kept."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    weights = {}
    for key, value in state.items():
        if not key.endswith(".kernel"):
            weights[key] = (value.squeeze(0) if value.ndim == 5 else value).float()
            continue
        kernel = torch.outer(taps, taps) * (1 if key.startswith("enc.") else 4)  # the decoder's belong to up-sampling
        if value.shape != kernel.shape or not torch.allclose(value.float().cpu(), kernel, atol=1e-6):
            raise UserError(f"tensor {key!r} is not the [1, 3, 3, 1] low-pass kernel: not a LIA-X checkpoint")
    ours = rename_all(weights, RULES)
    last = f"encoder.blocks.{len(numbered(ours, 'encoder.blocks.{}.conv1.weight'))}."
    return {key.replace("encoder.blocks.last.", last): value for key, value in ours.items()}
