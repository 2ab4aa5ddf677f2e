"""The official LIA-X checkpoint (`lia-x.pt`, a flat state dict): the names of its tensors, and its sizes.

It also stores the constant low-pass kernels (`*.kernel`), and keeps an axis of one in front of modulated weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.safe_pickle import read_tensors

FILE = "lia-x.pt"
WIDTH = 64  # channels at full size before `scale`, the same in every published network


def find_official(path: Path) -> Path | None:
    """The official file that `path` is, or that the folder `path` holds; None: neither."""
    path = path / FILE if (path / FILE).is_file() else path
    return path if path.is_file() else None


def read_official(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(fields of `LiaXConfig`, state dict under our names) of the official file."""
    state = read_tensors(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not a flat state dict: give the official {FILE}")
    return sizes_of(state), our_state(state)


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `LiaXConfig` by the shapes of an official `state`.

    Only the product of a width and `scale` shows in them; published networks are `WIDTH` wide before `scale`.
    """
    try:
        style_dim, motion_dim = state["dec.direction.weight"].shape
        first = state["enc.enc_2r.block1.0.weight"].shape[0]
        _, widest, base, _ = state["dec.input.input"].shape
    except KeyError as error:
        raise UserError(f"not a LIA-X checkpoint: it has no tensor {error}") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"not a LIA-X checkpoint: a tensor has another rank ({error})") from error
    scale = max(1, first // WIDTH)
    blocks = [key for key in state if re.fullmatch(r"enc\.enc_2r\.block(_512|\d+\.0)\.conv1\.0\.weight", key)]
    return {
        "style_dim": style_dim // scale,
        "motion_dim": motion_dim,
        "scale": scale,
        "size": base << len(blocks),
        "width": first // scale,
        "max_width": widest // scale,
        "depth": sum(re.fullmatch(r"dec\.conv_512_2\.\d+\.gamma", key) is not None for key in state),
    }


def our_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official `state` under our names, in float32. Kernels may be absent."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    last = sum(re.fullmatch(r"enc\.enc_2r\.block\d+\.0\.conv1\.0\.weight", key) is not None for key in state)
    ours = {}
    for key, value in state.items():
        if not key.endswith(".kernel"):
            ours[our_name(key, last)] = (value.squeeze(0) if value.ndim == 5 else value).float()
            continue
        kernel = torch.outer(taps, taps) * (1 if key.startswith("enc.") else 4)  # the decoder's belong to up-sampling
        if value.shape != kernel.shape or not torch.allclose(value.float().cpu(), kernel, atol=1e-6):
            raise UserError(f"tensor {key!r} is not the [1, 3, 3, 1] low-pass kernel: not a LIA-X checkpoint")
    return ours


_PREFIXES = {
    "enc.enc_2r.block1.": "encoder.stem.",
    "enc.enc_2r.block8.": "encoder.head.",
    "enc.enc_r2t.": "encoder.to_motion.",
    "dec.direction.": "decoder.directions.",
    "dec.input.input": "decoder.constant",
    "dec.conv1.": "decoder.first.",
}
_LEVEL_PARTS = {
    "conv_1": "grow",
    "conv_2": "flow_blocks",
    "conv_2_up": "carry",
    "conv_2_rgb": "refine_blocks",
    "flow": "to_flow",
    "rgb": "to_rgb",
}


def our_name(key: str, last: int) -> str:
    """Our name of an official tensor; an unknown name stays. `last` is the number of the encoder's last block.

    The first level is called 512 there and the others 2, 3, ...; so are the encoder's last block and its others.
    """
    # A layer is a sequence there, and the bias may belong to its activation.
    key = re.sub(r"\.\d+\.(weight|bias)$", r".\1", key).replace("activate.", "")
    for official, ours in _PREFIXES.items():
        if key.startswith(official):
            return ours + key.removeprefix(official)
    if block := re.fullmatch(r"enc\.enc_2r\.block(?:_512|(\d+)\.0)\.(.+)", key):
        return f"encoder.blocks.{last if block[1] is None else int(block[1]) - 2}.{block[2]}"
    if level := re.fullmatch(r"dec\.(conv|flow|rgb)(?:_512|(\d+))(|_1|_2|_2_up|_2_rgb)\.(.+)", key):
        number = 0 if level[2] is None else int(level[2]) - 1
        return f"decoder.levels.{number}.{_LEVEL_PARTS.get(level[1] + level[3])}.{level[4]}"
    return key
