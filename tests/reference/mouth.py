"""Mouth crops from 68 landmarks as Auto-AVSR's preparation makes them; the product makes AV-HuBERT's.

Axes: T frames, P landmarks, H height, W width. Points are (x, y) in pixels; a matrix (2, 3) maps source points to
picture points. Landmarks are numbered as iBUG 300-W does.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from hicodit.conditions.align import FRAME_SIDE, MOUTH, MOUTH_SIDE, WINDOW, transform, warp

AUTO_AVSR_STABLE = (28, 33, 36, 39, 42, 45, 48, 54)


def auto_avsr_mouth(
    frames: np.ndarray,
    landmarks: np.ndarray,
    mean_face: np.ndarray,
    stable: Sequence[int] = AUTO_AVSR_STABLE,
    window: int = WINDOW,
) -> tuple[np.ndarray, np.ndarray]:
    """Mouth crops as Auto-AVSR cuts them.

    The averaging window is centred, shorter at the ends, and moved to the current frame's own middle; the `stable`
    points fix the transform by least median of squares; grey comes before the warp.

    Args:
        frames: (T, H, W, 3) uint8 RGB. landmarks: (T, 68, 2) of every frame. mean_face: (68, 2) in a 256 x 256 frame.

    Returns:
        mouth (T, 96, 96) uint8 grey and matrices (T, 2, 3).

    Raises:
        ValueError: If a mouth lies too far from the middle of the picture, or no transform fits.
    """
    mouths = []
    matrices = []
    stable = list(stable)
    for i, frame in enumerate(frames):
        half = min(window // 2, i, len(frames) - 1 - i)
        smooth = landmarks[i - half : i + half + 1].mean(0)
        smooth = smooth + landmarks[i].mean(0) - smooth.mean(0)
        matrix = cv2.estimateAffinePartial2D(smooth[stable], mean_face[stable], method=cv2.LMEDS)[0]
        if matrix is None:
            raise ValueError(f"frame {i}: its landmarks are no face's: no transform to the mean face fits")
        centre = transform(matrix, smooth)[MOUTH].mean(0)
        if np.abs(centre - FRAME_SIDE / 2).max() > MOUTH_SIDE / 2 + 5:
            raise ValueError(f"frame {i}: the mouth lies at {centre.round()} of a {FRAME_SIDE} x {FRAME_SIDE} picture")
        grey = warp(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), matrix, FRAME_SIDE)
        mouths.append(_cut(grey, centre))
        matrices.append(matrix)
    return np.stack(mouths), np.stack(matrices)


def _cut(picture: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The `MOUTH_SIDE` square around `centre`, moved inside `picture` where it would stick out."""
    half = MOUTH_SIDE // 2
    x, y = (round(np.clip(c, half, side - half)) for c, side in zip(centre, picture.shape[::-1]))
    return picture[y - half : y + half, x - half : x + half]
