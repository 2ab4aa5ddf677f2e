"""Figure of generated speech: mouth crops, spectrogram and token levels on a common time axis."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.charts import chart_file
from engine.media.audio import mel_picture
from hicodit.conditions.types import EXPRESSIONS, FPS, WINDOW_SECONDS
from hicodit.pipeline import Speech

MOUTHS = 12
COLUMNS = 4000  # maximum number of columns of an image; matplotlib needs much memory per column


def draw(speech: Speech, path: Path) -> None:
    """Write the figure as PNG."""
    seconds = len(speech.crops.mouth) / FPS
    levels = len(speech.tokens)
    picks = np.linspace(0, len(speech.crops.mouth) - 1, MOUTHS).round().astype(int)
    mel = thinned(mel_picture(speech.wave, speech.rate))
    how = {"figsize": (12, 6.4), "height_ratios": (1, 3, 2), "sharex": True, "grid": False, "dpi": 100}
    with chart_file(path, 3, 1, **how) as (top, middle, bottom):
        top.imshow(np.concatenate(speech.crops.mouth[picks], 1), cmap="gray", aspect="auto", extent=(0, seconds, 0, 1))
        top.set_yticks([])
        top.set_ylabel("mouth")
        middle.imshow(mel, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, 80), vmin=mel.max() - 80)
        middle.set_ylabel("mel band")
        for j, expression in enumerate(speech.expression):
            if j == 0 or expression != speech.expression[j - 1]:
                middle.text(j * WINDOW_SECONDS, 82, EXPRESSIONS[expression], fontsize=8, va="bottom")
        bottom.imshow(
            thinned(speech.tokens),
            aspect="auto",
            cmap="viridis",
            extent=(0, seconds, levels + 0.5, 0.5),
            interpolation="none",
        )
        bottom.set_ylabel("token level")
        bottom.set_xlabel("seconds")


def thinned(picture: np.ndarray) -> np.ndarray:
    """Subsample an image (rows, columns) to at most `COLUMNS` evenly spaced columns, more than the figure has
    pixels.
    """
    return picture[:, :: -(-picture.shape[1] // COLUMNS)]
