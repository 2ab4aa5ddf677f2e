"""MaskGCT's published acoustic codec: its two files, whose decoder is Vocos, with key names as in `RVQCodec`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import UserError
from engine.official import numbered, rename_all, sizes_of, strides

FILES = ("model.safetensors", "model_1.safetensors")  # the latter contains the quantiser and the decoder
# The stored window of the inverse STFT is left out: the module computes it.
RULES = ((r"^model\.head\.istft\.window$", None), (r"^block\.", "encoder.block."), (r"^model\.", "decoder."))


def read_official(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return the fields of `RVQCodecConfig` and the state dict with renamed keys of the published files.

    Args:
        path: a folder that contains them, or whose subfolder `acoustic_codec` does. Returns None if neither does.
    """
    folder = next((place for place in (path / "acoustic_codec", path) if (place / FILES[1]).is_file()), None)
    if folder is None:
        return None
    state: dict[str, Tensor] = {}
    for file in (folder / name for name in FILES):
        if not file.is_file():
            raise UserError(f"{folder} has no {file.name}: download both files of MaskGCT's acoustic_codec folder")
        try:
            state |= rename_all(load_file(file), RULES)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}); download it again") from error
    return config_of(state), state


def config_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the fields of `RVQCodecConfig` that match the shapes of an upstream state dict with renamed keys."""
    with sizes_of("MaskGCT's acoustic codec"):
        ratios = strides(state, "encoder.block.{}.block.4.weight_v")
        book = state["quantizer.quantizers.0.codebook.weight"]
        width = state["decoder.backbone.embed.weight"]
        return {
            "encoder_width": len(state["encoder.block.0.weight_v"]),
            "ratios": ratios,
            "latent_channels": width.shape[1],
            "levels": len(numbered(state, "quantizer.quantizers.{}.codebook.weight")),
            "codebook_size": book.shape[0],
            "codebook_dim": book.shape[1],
            "vocos_dim": width.shape[0],
            "vocos_intermediate": len(state["decoder.backbone.convnext.0.pwconv1.weight"]),
            "vocos_layers": len(numbered(state, "decoder.backbone.convnext.{}.gamma")),
            "n_fft": len(state["decoder.head.out.weight"]) - 2,
            "hop": math.prod(ratios),
        }
