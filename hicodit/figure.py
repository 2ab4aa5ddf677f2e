"""The picture that goes with a clip's speech: mouth crops, spectrogram, token levels, on one time axis."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from engine.media.audio import mel_picture
from hicodit.conditions.types import EXPRESSIONS, FPS, WINDOW_SECONDS
from hicodit.pipeline import Speech

MOUTHS = 24
COLUMNS = 4000  # of a picture; matplotlib takes many bytes for each


def draw(speech: Speech, path: Path) -> None:
    """Write the figure as PNG."""
    seconds = len(speech.crops.mouth) / FPS
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(12, 6.4), height_ratios=(1, 3, 2), constrained_layout=True, sharex=True
    )
    picks = np.linspace(0, len(speech.crops.mouth) - 1, MOUTHS).round().astype(int)
    top.imshow(np.concatenate(speech.crops.mouth[picks], 1), cmap="gray", aspect="auto", extent=(0, seconds, 0, 1))
    top.set_yticks([])
    top.set_ylabel("mouth")
    mel = thinned(mel_picture(speech.wave, speech.rate))
    middle.imshow(mel, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, 80), vmin=mel.max() - 80)
    middle.set_ylabel("mel band")
    for j, expression in enumerate(speech.expression):
        start = j * WINDOW_SECONDS
        if j == 0 or expression != speech.expression[j - 1]:
            middle.text(start, 82, EXPRESSIONS[expression], fontsize=8, va="bottom")
    levels = len(speech.tokens)
    bottom.imshow(
        thinned(speech.tokens),
        aspect="auto",
        cmap="viridis",
        extent=(0, seconds, levels + 0.5, 0.5),
        interpolation="none",
    )
    bottom.set_ylabel("token level")
    bottom.set_xlabel("seconds")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def thinned(picture: np.ndarray) -> np.ndarray:
    """Return at most `COLUMNS` evenly spaced columns of a picture (rows, columns): more than the figure has pixels."""
    return picture[:, :: -(-picture.shape[1] // COLUMNS)]
