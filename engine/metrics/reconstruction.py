"""How well a portrait codec rebuilds a clip: PSNR and SSIM of whole pictures, and of the eyes and the mouth alone.

`movement` is the share of a region's variance in time that the rebuilt frames explain: 1 is all, 0 is as good as the
clip's mean picture. Regions are boxes of a square picture in which the face is framed as in the synthetic corpus.

Axes: T frames, S side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from engine.media.pictures import to_bytes, video_to_tensor
from engine.media.video import read_video
from engine.metrics.metric import Figure, PictureMetric, Take
from engine.metrics.picture import psnr, ssim
from engine.metrics.speech import FPS

Box = Mapping[str, float]  # left, top, right, bottom, in shares of the side
REGIONS: dict[str, Box] = {
    "eyes": {"left": 0.27, "top": 0.36, "right": 0.73, "bottom": 0.58},
    "mouth": {"left": 0.30, "top": 0.63, "right": 0.70, "bottom": 0.92},
}


class Reconstruction(PictureMetric):
    figures: ClassVar = {
        "psnr": Figure("PSNR dB", 1, 2, meaning="of whole pictures"),
        "ssim": Figure("SSIM", 1, 4, meaning="of whole pictures"),
        "mouth_psnr": Figure("mouth PSNR dB", 1, 2, meaning="of the mouth's region"),
        "mouth_movement": Figure(
            "mouth movement", 1, 3, meaning="share of the mouth's variance in time that is rebuilt"
        ),
        "eyes_psnr": Figure("eyes PSNR dB", 1, 2, meaning="of the eyes' region"),
        "eyes_movement": Figure("eyes movement", 1, 3, meaning="share of the eyes' variance in time that is rebuilt"),
    }

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        made, true = read_video(take.video, FPS), read_video(truth.video, FPS)
        length = min(len(made), len(true))
        true = to_bytes(video_to_tensor(true[:length], made.shape[1]) + 0.5 / 127.5)  # + 0.5: `to_bytes` truncates
        return {name: (value, 1) for name, value in reconstruction(true, made[:length], REGIONS).items()}


def reconstruction(true: np.ndarray, rebuilt: np.ndarray, regions: Mapping[str, Box]) -> dict[str, float]:
    """Return `psnr` (dB), `ssim`, and NAME_psnr and NAME_movement of regions, for frames (T, S, S, 3) of bytes."""
    pictures = [torch.from_numpy(frames).permute(0, 3, 1, 2) for frames in (true, rebuilt)]
    found = {"psnr": psnr(*pictures), "ssim": ssim(*pictures)}
    for name, box in regions.items():
        a, b = (region(frames, box).astype(np.float64) for frames in (true, rebuilt))
        found[f"{name}_psnr"] = psnr(torch.from_numpy(a), torch.from_numpy(b))
        variance = np.square(a - a.mean(0)).sum()
        if variance > 0:
            found[f"{name}_movement"] = float(1 - np.square(a - b).sum() / variance)
    return found


def region(frames: np.ndarray, box: Box) -> np.ndarray:
    """Cut (T, S, S, 3) to a box given in shares of the side."""
    left, top, right, bottom = (round(box[side] * frames.shape[1]) for side in ("left", "top", "right", "bottom"))
    return frames[:, top:bottom, left:right]
