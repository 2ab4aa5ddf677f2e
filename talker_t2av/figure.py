"""A talking face on one time axis: frames, spectrogram, and the mouth's opening with the loudness of the sound."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from engine.files import atomic_output
from engine.media.audio import mel_picture
from engine.metrics.speech import loudness
from talker_t2av.model import FPS
from talker_t2av.pipeline import Talk, TalkerPipeline

FACES = 10


def draw(talk: Talk, text: str, opening: np.ndarray, path: Path) -> None:
    """Write the figure as PNG; `opening` (T,) is that of the mouth in each frame."""
    rate, seconds = TalkerPipeline.rate, len(talk.frames) / FPS
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(12, 5.4), height_ratios=(1, 2, 1), constrained_layout=True, sharex=True
    )
    picks = ((np.arange(FACES) + 0.5) * len(talk.frames) / FACES).astype(int)
    top.imshow(np.concatenate(talk.frames[picks], 1), aspect="auto", extent=(0, seconds, 0, 1))
    top.set_yticks([])
    top.set_title(f'"{text}"')
    mel = mel_picture(talk.wave, rate)
    middle.imshow(mel, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, 80), vmin=mel.max() - 80)
    middle.set_ylabel("mel band")
    level, times = loudness(talk.wave, rate), (np.arange(len(opening)) + 0.5) / FPS
    bottom.plot(times, opening, label="mouth opening, read from the frames")
    bottom.plot(times[: len(level)], level / max(level.max(), 1e-9), label="loudness")
    bottom.set_xlim(0, seconds)
    bottom.set_xlabel("seconds")
    bottom.set_ylim(-0.05, 1.5)
    bottom.legend(loc="upper right", ncols=2, fontsize=8)
    with atomic_output(path) as staging:
        figure.savefig(staging, dpi=100)
    plt.close(figure)
