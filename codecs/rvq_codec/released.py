"""MaskGCT's published acoustic codec: its two files, and their key names as they stand in `RVQCodec`."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import UserError

ENCODER, DECODER = "model.safetensors", "model_1.safetensors"  # the latter holds the quantiser, too


def find_official(path: Path) -> Path | None:
    """The folder of the published files: `path` or its subfolder `acoustic_codec`; None: neither has them."""
    return next((place for place in (path / "acoustic_codec", path) if (place / DECODER).is_file()), None)


def read_official(folder: Path, decoder: str) -> dict[str, Tensor]:
    """The state dict of an `RVQCodec` with this kind of `decoder` ("vocos" or "conv").

    Raises:
        UserError: a file is missing or damaged.
    """
    states = []
    for name in (ENCODER, DECODER):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: download both files of MaskGCT's acoustic_codec folder")
        try:
            states.append(load_file(folder / name))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name} is damaged ({error}); download it again") from error
    return {**encoder_state(states[0]), **decoder_state(states[1], decoder)}


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
