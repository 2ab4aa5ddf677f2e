"""How the official program cuts and mixes its recordings; the golden case `dataset` certifies it.

The product trains on prepared shards, whose audio and motion have one length, and pairs its two tasks otherwise
(`talker_t2av.data.TalkerPairs`).

Axes: N samples at 24 kHz, N16 at 16 kHz, Fm motion frames, Dm motion channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from talker_t2av.model import FPS, HOP, HOP16, MAX_FRAMES, RATE16


def repeated(first: Sequence[Any], second: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Both lists, the smaller one repeated round(larger / smaller) times, as the official program mixes its tasks."""
    if not first or not second:
        return list(first), list(second)
    times = max(1, round(max(len(first), len(second)) / min(len(first), len(second))))
    smaller_first = len(first) < len(second)
    return list(first) * (times if smaller_first else 1), list(second) * (1 if smaller_first else times)


@dataclass(frozen=True)
class Recording:
    """Audio and motion of one row after the 30 s window, and the numbers of frames that count.

    Attributes:
        wave: (N,) at 24 kHz.
        wave16: (N16,) at 16 kHz.
        motion: (Fm, Dm) normalised, Fm = 0 for TTS.
        speech_frames: latent frames that the audio is counted as, 1..750.
    """

    wave: Tensor
    wave16: Tensor
    motion: Tensor
    speech_frames: int


def cut_recording(wave: Tensor, wave16: Tensor, motion: Tensor, start: int = 0) -> Recording:
    """A recording's window of 30 s from motion frame `start`; the audio is cut to the motion's length.

    The motion is not yet cut to whole patches then, so that speech often has one more, partly filled, patch.
    """
    if len(motion):
        motion = motion[start : start + MAX_FRAMES]
        wave = wave[start * HOP : (start + len(motion)) * HOP]
        wave16 = wave16[start * HOP16 : (start + len(motion)) * HOP16]
    wave = wave[: MAX_FRAMES * HOP]
    wave16 = wave16[: MAX_FRAMES * HOP16]
    # In floating point as the official program does it: 29 frames of samples are counted as 28.
    return Recording(wave, wave16, motion, min(MAX_FRAMES, max(1, int(len(wave16) / RATE16 * FPS))))
