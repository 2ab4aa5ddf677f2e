"""Lags between the audio and the video of clips, measured with a linear model of the spectrum seen in the mouth.

Audio and video of a corpus may be out of sync by a different time in each clip; in GRID, the standard deviation is 20
ms. A model trained on such clips learns blurred timing, and metrics such as ESTOI fall with every 10 ms (docs/grid.md;
Niu and Mak, arXiv 2303.00502, measure and correct it with a network). Here, a ridge regression predicts mel bands from
mouth crops. It has far fewer weights than there are frames and never saw the clip that it predicts, so it cannot know
the clip's lag, which is where the predicted and the actual bands correlate best.

Axes: n clips, T video frames (25 per second), S side of mouth crops, N spectrum frames (100 per second), P principal
components, C features, M mel bands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.nn.mel import HOP, N_FFT, RATE, log_mel, pad_or_trim

STEP = HOP / RATE  # seconds per spectrum frame
PER_FRAME = 4  # spectrum frames per video frame
SIDE = 24  # side in pixels to which mouth crops are reduced
COMPONENTS = 60
SEEN = range(-5, 6)  # video frames around a moment that the model sees
BANDS = 24
FOLDS = 10
ROUNDS = 2  # in the second round, the model is fitted to audio without the lags of the first
RIDGE = 1000.0
REACH = 25  # maximum lag in spectrum frames
LARGE = 0.08  # seconds from which a lag counts only if it is clear
CLEAR = 0.1  # increase of the correlation that makes a large lag clear


class LagMeter:
    """Collects clips and measures the lag of the audio of each. It needs hundreds of clips."""

    def __init__(self) -> None:
        self.mouths: list[Tensor] = []  # (T, SIDE * SIDE) float16 each
        self.spectra: list[Tensor] = []  # (N, M) each

    def add(self, mouth: Tensor, wave: Tensor) -> None:
        """Add a clip.

        Args:
            mouth: mouth crops (T, S, S) uint8.
            wave: audio (samples,) at 16 kHz that starts with the first crop.
        """
        pictures = mouth.float() / 255
        pictures = (pictures - pictures.mean((1, 2), keepdim=True)) / (pictures.std((1, 2), keepdim=True) + 0.05)
        pictures = F.interpolate(pictures[:, None], (SIDE, SIDE), mode="area")
        bands = log_mel(pad_or_trim(wave, max(len(wave), N_FFT)), BANDS).T[: PER_FRAME * len(mouth)]
        self.mouths.append(pictures.flatten(1).half())
        self.spectra.append((bands - bands.mean(0)) / (bands.std(0) + 1e-3))

    def measure(self) -> Tensor:
        """Return the seconds (n,) by which the audio of each clip is late, relative to the median of all clips. NaN:
        unclear.
        """
        sample = torch.cat(self.mouths[:: max(1, len(self.mouths) // 300)]).float()
        centre = sample.mean(0)
        variances, directions = torch.linalg.eigh((sample - centre).T.cov())
        projection = directions[:, -COMPONENTS:] / (variances[-COMPONENTS:] + 1e-6).sqrt()
        components = [(mouth.float() - centre) @ projection for mouth in self.mouths]
        lags = torch.zeros(len(components))
        for _ in range(ROUNDS):
            lags = torch.tensor([lag_of(*pair) for pair in zip(self._predict(components, lags), self.spectra)])
            lags = lags - lags.nanmedian()
        return lags

    def _predict(self, components: Sequence[Tensor], lags: Tensor) -> Iterator[Tensor]:
        """Yield for each clip the bands (N, M) that a model predicts which was fitted to the other folds."""
        folds = [range(first, len(components), FOLDS) for first in range(min(FOLDS, len(components)))]
        sums = []
        for fold in folds:
            products = 0
            moments = 0
            for i in fold:
                x = features(components[i])[: len(self.spectra[i])]
                y = torch.roll(self.spectra[i], -round(float(lags[i].nan_to_num()) / STEP), 0)
                products = products + x.T @ x
                moments = moments + x.T @ y
            sums.append((products, moments))
        all_products = sum(products for products, _ in sums)
        all_moments = sum(moments for _, moments in sums)
        penalty = RIDGE * torch.eye(len(all_products))
        weights = [
            torch.linalg.solve(all_products - products + penalty, all_moments - moments) for products, moments in sums
        ]
        for i, each in enumerate(components):
            yield features(each)[: len(self.spectra[i])] @ weights[i % FOLDS]


def features(components: Tensor) -> Tensor:
    """Return the features (4 T, C) of each spectrum frame: the components (T, P) around it, linearly interpolated."""
    last = len(components) - 1
    time = (
        torch.arange(PER_FRAME * len(components)) + 0.5
    ) / PER_FRAME - 0.5  # in video frames, from the first's centre
    parts = []
    for offset in SEEN:
        position = (time + offset).clamp(0, last)
        index = position.floor().long().clamp(max=max(last - 1, 0))
        weight = (position - index)[:, None]
        parts.append(components[index] * (1 - weight) + components[(index + 1).clamp(max=last)] * weight)
    return torch.cat([*parts, torch.ones(len(time), 1)], 1)


def lag_of(predicted: Tensor, bands: Tensor) -> float:
    """Return the seconds by which `bands` (N, M) are later than `predicted` (N, M), by the maximum of the correlation,
    interpolated with a parabola. NaN: unclear.
    """
    middle = predicted[REACH:-REACH]
    middle = middle - middle.mean(0)
    scores = []
    for start in range(2 * REACH + 1):
        part = bands[start : start + len(middle)]
        part = part - part.mean(0)
        scores.append((middle * part).sum() / (middle.norm() * part.norm() + 1e-9))
    scores = torch.stack(scores)
    best = int(scores.argmax())
    is_large = STEP * abs(best - REACH) >= LARGE
    if best in (0, 2 * REACH) or (is_large and scores[best] < scores[REACH] + CLEAR):
        return float("nan")
    before, at, after = scores[best - 1 : best + 2].tolist()
    return STEP * (best - REACH + (before - after) / (2 * (before - 2 * at + after)))
