"""Figure of a talking face: frames, spectrogram, mouth movement and loudness on a common time axis.

Axes: F frames.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from textwrap import shorten

import numpy as np

from engine.charts import chart_file
from engine.media.audio import loudness, mel_picture
from talker_t2av.model import FPS
from talker_t2av.pipeline import Talk, TalkerPipeline

FACES = 10


def movement(frames: np.ndarray) -> np.ndarray:
    """Return the mean frame-to-frame change (F - 1,) of the mouth region of a portrait, normalised to a maximum
    of 1.
    """
    side = frames.shape[1]
    mouth = frames[:, side * 6 // 10 : side * 9 // 10, side * 3 // 10 : side * 7 // 10].astype(np.float32)
    change = np.abs(np.diff(mouth, axis=0)).mean((1, 2, 3))
    return change / max(change.max(initial=0), 1e-9)


def draw(talk: Talk, text: str, path: Path) -> None:
    """Write the figure as PNG."""
    rate = TalkerPipeline.rate
    seconds = len(talk.frames) / FPS
    picks = ((np.arange(FACES) + 0.5) * len(talk.frames) / FACES).astype(int)
    mel = mel_picture(talk.wave, rate)
    level = loudness(talk.wave, rate)
    change = movement(talk.frames)
    how = {"figsize": (12, 5.4), "height_ratios": (1, 2, 1), "sharex": True, "grid": False, "dpi": 100}
    with (
        warnings.catch_warnings(action="ignore"),  # the font may not have a character
        chart_file(path, 3, 1, **how) as (top, middle, bottom),
    ):
        top.imshow(np.concatenate(talk.frames[picks], 1), aspect="auto", extent=(0, seconds, 0, 1))
        top.set_yticks([])
        top.set_title(shorten(text, 100), parse_math=False)
        middle.imshow(mel, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, 80), vmin=mel.max() - 80)
        middle.set_ylabel("mel band")
        bottom.plot((np.arange(len(change)) + 1) / FPS, change, label="movement around the mouth, frame to frame")
        bottom.plot((np.arange(len(level)) + 0.5) / FPS, level / max(level.max(), 1e-9), label="loudness")
        bottom.set_xlim(0, seconds)
        bottom.set_xlabel("seconds")
        bottom.set_ylabel("relative")
        bottom.set_ylim(-0.05, 1.5)
        bottom.legend(loc="upper right", ncols=2, fontsize=8)
