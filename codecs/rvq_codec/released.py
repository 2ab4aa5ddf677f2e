"""MaskGCT's published acoustic codec: its two files, and their key names as they stand in `RVQCodec`."""

from __future__ import annotations

import math
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import UserError

ENCODER, DECODER = "model.safetensors", "model_1.safetensors"  # the latter holds the quantiser, too


def find_official(path: Path) -> Path | None:
    """The folder of the published files: `path` or its subfolder `acoustic_codec`; None: neither has them."""
    return next((place for place in (path / "acoustic_codec", path) if (place / DECODER).is_file()), None)


def read_official(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(fields of `RVQCodecConfig`, state dict under our names) of the published files, whose decoder is Vocos."""
    states = []
    for name in (ENCODER, DECODER):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: download both files of MaskGCT's acoustic_codec folder")
        try:
            states.append(load_file(folder / name))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name} is damaged ({error}); download it again") from error
    return sizes_of(*states, folder), {**encoder_state(states[0]), **decoder_state(states[1], "vocos")}


def sizes_of(encoder: dict[str, Tensor], decoder: dict[str, Tensor], source: Path) -> dict[str, Any]:
    """The fields of `RVQCodecConfig` by the shapes of the two published states."""
    try:
        blocks = takewhile(encoder.__contains__, (f"block.{i}.block.4.weight_v" for i in count(1)))
        strides = tuple(encoder[key].shape[-1] // 2 for key in blocks)  # half the kernel
        book = decoder["quantizer.quantizers.0.codebook.weight"]
        width = decoder["model.backbone.embed.weight"]
        return {
            "encoder_width": len(encoder["block.0.weight_v"]),
            "ratios": strides,
            "latent_channels": width.shape[1],
            "levels": next(q for q in count() if f"quantizer.quantizers.{q}.codebook.weight" not in decoder),
            "codebook_size": book.shape[0],
            "codebook_dim": book.shape[1],
            "vocos_dim": width.shape[0],
            "vocos_intermediate": len(decoder["model.backbone.convnext.0.pwconv1.weight"]),
            "vocos_layers": next(n for n in count() if f"model.backbone.convnext.{n}.gamma" not in decoder),
            "n_fft": len(decoder["model.head.out.weight"]) - 2,
            "hop": math.prod(strides),
        }
    except (KeyError, IndexError) as error:
        raise UserError(f"{source} is not MaskGCT's acoustic codec: it lacks the tensor {error}") from error


def encoder_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published encoder file: `block.*` -> `encoder.block.*`."""
    return {f"encoder.{key}": value for key, value in state.items()}


def decoder_state(state: dict[str, Tensor], decoder: str) -> dict[str, Tensor]:
    """The published quantiser and decoder file: `model.*` -> `decoder.*` (Vocos) or `decoder.model.*` (convolutional).

    The stored window of the inverse STFT is left out: the module computes it.
    """
    prefix = "decoder." if decoder == "vocos" else "decoder.model."
    return {
        prefix + key.removeprefix("model.") if key.startswith("model.") else key: value
        for key, value in state.items()
        if key != "model.head.istft.window"
    }
