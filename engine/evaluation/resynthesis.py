"""Resynthesis of ground-truth clips by codecs, as outputs of an evaluation.

Axes: N samples, T frames, H height, W width, S side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.codec import Codec, PortraitCodec, load_codec
from engine.device import to_device
from engine.errors import UserError
from engine.evaluation.clips import Clip
from engine.evaluation.generate import ALL_BATCHES, write_facts, write_missing, write_take
from engine.instantiate import target
from engine.media.pictures import identity_to_tensor, to_bytes, video_to_tensor
from engine.media.video import read_video
from engine.metrics.metric import FPS, wave_of
from engine.settings import require_range

RATE = 24_000  # sample rate of the audio of a rendered face


def write_resynthesis(
    name: str,
    bundled: Path,
    clips: Sequence[Clip],
    folder: Path,
    device: str,
    weights: str | None = None,
    levels: int | None = None,
    chosen: slice = ALL_BATCHES,
) -> None:
    """Write the reconstruction of the audio or video of every clip by a codec, where the output is missing.

    A portrait codec renders the motion of each clip on its first frame. The original audio is added.

    Args:
        name: dotted name of the class of the codec.
        bundled: its bundled release folder.
        clips: clips of the evaluation.
        folder: folder of the files.
        device: device of the codec.
        weights: release folder of the codec. None: the bundled one.
        levels: number of codebook levels to decode.
        chosen: slice of the batches to write.

    Raises:
        UserError: If a setting is invalid, or an existing output was generated from other inputs.
    """
    kind = target(name)
    codec = load_codec(weights or bundled, {kind.kind: kind}).to(device)
    portrait = isinstance(codec, PortraitCodec)
    facts: dict[str, Any] = {"given": "audio"} if portrait else {}
    if hasattr(codec, "levels"):
        levels = codec.levels if levels is None else levels
        require_range("generate.levels", levels, 1, codec.levels)
        bits = levels * np.log2(codec.codes) * codec.frame_rate
        facts = {"levels": levels, "bits_per_second": float(bits)}
    elif levels is not None:
        raise UserError(f"generate.levels={levels}: {codec.kind} has no levels")
    write_facts(folder, codec.kind, weights or bundled, **facts)

    def write(batch: Sequence[tuple[int, Clip]]) -> None:
        for _, clip in batch:
            frames = None
            rate = RATE if portrait else codec.sample_rate
            wave = wave_of(clip.truth.audio, rate)
            if portrait:
                if clip.truth.source is None:
                    raise UserError("no video to reconstruct: expected ID.mp4 in references=, or video in the manifest")
                frames = rebuild(codec, read_video(clip.truth.source, FPS))
            else:
                wave = rebuild_wave(codec, wave, levels)
            write_take(folder, clip.id, wave, rate, frames)

    def inputs(_: int, clip: Clip) -> list[Path | None]:
        return [clip.truth.source if portrait else clip.truth.audio]

    with torch.inference_mode():
        write_missing(clips, folder, 1, inputs, write, chosen=chosen)


def rebuild_wave(codec: Codec, wave: np.ndarray, levels: int | None = None) -> np.ndarray:
    """Encode and decode a waveform (N,) at the sample rate of the codec. `levels` limits the codebook levels; None uses
    all.
    """
    code = codec.encode(to_device(torch.from_numpy(wave.copy())[None, None], next(codec.parameters()).device))
    code = code if levels is None else code[:, :levels]
    return decode_wave(codec, code, len(wave))


def decode_wave(codec: Codec, code: Tensor, samples: int) -> np.ndarray:
    """Decode the code of one waveform to `samples` samples (N,), cropped or zero-padded at the end."""
    wave = codec.decode(code)[0, 0, :samples].float().cpu().numpy()
    return np.pad(wave, (0, samples - len(wave)))


def rebuild(codec: PortraitCodec, frames: np.ndarray, face: np.ndarray | None = None) -> np.ndarray:
    """Render the motion of frames (T, H, W, 3) on their first frame, or on `face` (H, W, 3). Return (T, S, S,
    3) uint8.
    """
    device = next(codec.parameters()).device
    motion = codec.encode(video_to_tensor(frames, codec.size))  # which moves them to the device in chunks
    picture = identity_to_tensor(frames[0] if face is None else face, codec.size)
    return to_bytes(codec.decode(motion, codec.identity(to_device(picture, device))))
