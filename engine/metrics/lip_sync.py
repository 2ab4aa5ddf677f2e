"""LSE-C and LSE-D, called Sync-C and Sync-D elsewhere: agreement of lips and sound by SyncNet.

Chung and Zisserman 2016; scores of Prajwal et al. 2020, arXiv:2008.10010. `engine.metrics.syncnet` has the network,
whose released weights (no licence stated) are downloaded. 25 frames a second, 31 shifts. The face is cut as SyncNet's
own program cuts it, a margin of 0.4 around the tracked box, but found by OpenCV's cascade, where that program uses
S3FD: figures of clips with loose boxes differ from its figures.

Axes: T frames, H height, W width.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from engine.errors import UserError
from engine.faces.clip import find_face
from engine.media.video import read_video
from engine.metrics.metric import Figure, Metric, Take, wave_of
from engine.metrics.syncnet import RATE, SIDE, SyncNet

FPS, MARGIN, SMOOTH = 25.0, 0.4, 13
MAX_SIDE = 1280  # of the picture in which the face is looked for


def face_squares(frames: np.ndarray, boxes: np.ndarray, size: int = SIDE) -> np.ndarray:
    """Cut (T, H, W, 3) by boxes (T, 4) of x, y, w, h to (T, size, size, 3), what is outside the picture grey.

    With s half of the box's longer side, the square reaches from s above its middle to 1.8 s below, 1.4 s to the sides;
    middle and s are medians over 13 frames.
    """
    middles, halves = boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:].max(1, keepdims=True) / 2
    values = np.concatenate([middles, halves], 1)
    edge = SMOOTH // 2
    values = np.median(sliding_window_view(np.pad(values, ((edge, edge), (0, 0)), "edge"), SMOOTH, 0), -1)
    out = np.empty((len(frames), size, size, 3), np.uint8)
    for i, (frame, (x, y, half)) in enumerate(zip(frames, values)):
        left, top, side = x - half * (1 + MARGIN), y - half, half * 2 * (1 + MARGIN)
        scale = size / side
        matrix = np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])
        mode = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        out[i] = cv2.warpAffine(frame, matrix, (size, size), flags=mode, borderValue=(110, 110, 110))
    return out


@lru_cache(2)
def face_video(path: Path | None) -> np.ndarray:
    """Cut squares of the largest face of a video at 25 frames a second: (T, 224, 224, 3) bytes."""
    if path is None:
        raise UserError("the clip has no picture")
    frames = read_video(path, FPS, MAX_SIDE)
    return face_squares(frames, find_face([frames], FPS).boxes)


class LipSync(Metric):
    figures: ClassVar = {
        "lse_c": Figure("LSE-C", 1, meaning="confidence that lips and sound agree"),
        "lse_d": Figure("LSE-D", -1, meaning="distance of lips and sound at the best shift"),
    }
    names = ("syncnet_v2.model",)
    inputs = ("audio", "video", "source")

    def load(self) -> None:
        self.network = SyncNet.from_pretrained(*self.files(self.protocol, self.weights)).to(self.device)

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        score = self.network.score(face_video(take.video or take.source), wave_of(take.audio, RATE))
        return {"lse_c": (score.confidence, 1), "lse_d": (score.distance, 1), "offset": score.offset}
