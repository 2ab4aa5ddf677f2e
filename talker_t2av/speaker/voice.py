"""Saved voices: the speaker embedding of a recording in a file of a few kilobytes, in place of the recording.

Axes: G values of the embedding.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from engine.errors import UserError
from engine.files import atomic_output
from engine.media.ffmpeg import check_readable

MAX_BYTES = 2**20


def save_voice(path: str | Path, speaker: Tensor, digest: str) -> None:
    """Write an embedding (G,) and the digest of the encoder that made it."""
    with atomic_output(path) as staging:
        staging.write_bytes(save({"speaker": speaker.detach().float().cpu().contiguous()}, {"encoder": digest}))


def read_voice(path: str | Path, digest: str, size: int) -> Tensor:
    """Return the embedding (G,) of a saved voice.

    Args:
        digest: of the encoder whose embeddings the model knows. size: G.
    """
    path = check_readable(path)
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, too many for a saved voice: give another file")
    content = path.read_bytes()
    try:
        speaker = load(content)["speaker"]
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is not a saved voice ({error}): save it anew from a recording") from error
    if f'"{digest}"'.encode() not in content or speaker.shape != (size,) or not torch.isfinite(speaker).all():
        raise UserError(f"{path} was saved by another speaker encoder: save it anew from a recording")
    return speaker
