"""Mouth crops from 68 landmarks, as the official preparations of AV-HuBERT and of Auto-AVSR make them.

The product's detectors find five points, from which `hicodit.conditions.align.mouth_picture` makes the same crop as
nearly as they allow; `test_mouth.py` holds it to the crop here.

Axes: T frames, P landmarks, H height, W width. Points are (x, y) in pixels; a matrix (2, 3) maps source points to
picture points. Landmarks are numbered as iBUG 300-W does: 27-35 nose, 36-41 and 42-47 eyes, 48-67 mouth.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from hicodit.conditions.align import (
    FRAME_SIDE,
    MEAN_STABLE,
    MOUTH_SIDE,
    bilinear,
    invert,
    similarity,
    transform,
    warp,
)

MOUTH = slice(48, 68)
STABLE = (33, 36, 39, 42, 45)  # no speech moves them
AUTO_AVSR_STABLE = (28, 33, 36, 39, 42, 45, 48, 54)
WINDOW = 12  # frames over which landmarks are averaged


def fill_landmarks(landmarks: np.ndarray, present: np.ndarray) -> np.ndarray:
    """(T, P, 2): frames where `present` (T,) is false get landmarks on the line between their neighbours'.

    Raises:
        ValueError: no frame has landmarks.
    """
    if not present.any():
        raise ValueError("no frame of the clip has landmarks")
    time, known = np.arange(len(landmarks)), np.flatnonzero(present)
    flat = landmarks.reshape(len(landmarks), -1).astype(np.float64)
    filled = np.stack([np.interp(time, known, column[known]) for column in flat.T], 1)
    filled[known] = flat[known]
    return filled.reshape(landmarks.shape)


def avhubert_matrices(points: np.ndarray, mean_points: np.ndarray = MEAN_STABLE, window: int = WINDOW) -> np.ndarray:
    """AV-HuBERT's transforms (T, 2, 3) from points (T, P, 2) of every frame onto those of the mean face (P, 2).

    Points are averaged over up to `window` frames that BEGIN at the current one; the last full window serves all frames
    after its first.
    """
    window = min(len(points), window)
    full = len(points) - window + 1
    matrices = [similarity(points[i : i + window].mean(0), mean_points) for i in range(full)]
    return np.stack(matrices + [matrices[-1]] * (window - 1))


def avhubert_mouth(
    frames: np.ndarray,
    landmarks: np.ndarray,
    mean_stable: np.ndarray = MEAN_STABLE,
    stable: Sequence[int] = STABLE,
    window: int = WINDOW,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mouth pictures as AV-HuBERT's own preparation cuts them, without its detour over a lossy file.

    Args:
        frames: (T, H, W, 3) uint8 RGB. landmarks: (T, 68, 2) of every frame. mean_stable: (P, 2) the mean face's
            points of numbers `stable`. window: frames over which landmarks are averaged.

    Returns:
        mouth (T, 96, 96) uint8 grey, matrices (T, 2, 3), and mouth centres (T, 2) in the 256 x 256 frame.
    """
    matrices = avhubert_matrices(landmarks[:, list(stable)], mean_stable, window)
    centres = np.stack([transform(m, points[MOUTH]).mean(0) for m, points in zip(matrices, landmarks)])
    mouths = []
    for frame, matrix, centre in zip(frames, matrices, centres):
        inverse, x = invert(matrix), np.arange(FRAME_SIDE, dtype=np.float64)
        sx, sy = (row[0] * x + row[1] * x[:, None] + row[2] for row in inverse)
        values = bilinear(frame / 255.0, sx, sy) * 255
        pose = cv2.cvtColor(values.astype(np.uint8), cv2.COLOR_RGB2GRAY)  # the original cuts fractions off
        mouths.append(_cut(pose, centre))
    return np.stack(mouths), matrices, centres


def auto_avsr_mouth(
    frames: np.ndarray,
    landmarks: np.ndarray,
    mean_face: np.ndarray,
    stable: Sequence[int] = AUTO_AVSR_STABLE,
    window: int = WINDOW,
) -> tuple[np.ndarray, np.ndarray]:
    """Mouth pictures as Auto-AVSR cuts them.

    The averaging window is centred, shorter at the ends, and moved to the current frame's own middle; the `stable`
    points fix the transform by least median of squares; grey comes before the warp.

    Args:
        frames: (T, H, W, 3) uint8 RGB. landmarks: (T, 68, 2) of every frame. mean_face: (68, 2) in a 256 x 256 frame.

    Returns:
        mouth (T, 96, 96) uint8 grey and matrices (T, 2, 3).

    Raises:
        ValueError: a mouth lies too far from the middle of the picture, or no transform fits.
    """
    mouths, matrices, stable = [], [], list(stable)
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
