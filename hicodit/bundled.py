"""The two bundled releases: one for drawn faces, one for filmed ones.

Axes: T frames, H height, W width, n pictures, S picture side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.faces.clip import ArrayFrames, find_faces
from engine.faces.crops import crop_face
from engine.faces.track import FaceError
from engine.media.video import iter_video
from hicodit.conditions.types import FPS
from hicodit.settings import BUNDLED

DRAWN = BUNDLED
FILMED = BUNDLED.parent / "hicodit_grid"
LOOK_FRAMES = 32  # of the beginning of a clip, that are looked at
PICTURES = 4
SIDE = 64  # pixels of the face pictures
MAX_SIDE = 640  # pixels of the frames
STEP = 1.5  # of 255: neighbouring pixels that differ by less are flat
FLAT_FRACTION = 0.4  # drawn faces have 0.46 or more, those of GRID at most 0.35


def flat_fraction(faces: np.ndarray) -> float:
    """Return the fraction of horizontal neighbours in pictures (n, S, S, 3) uint8 that are equally bright.

    A drawn face has areas of one colour; skin, and the noise of a camera, have hardly any.
    """
    grey = faces.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return float((np.abs(np.diff(grey, axis=-1)) < STEP).mean())


def bundled_weights(video: str | Path | np.ndarray) -> Path:
    """Return the folder of the bundled release that suits a clip, by its first faces.

    A clip without a face gets the release for filmed faces: generation then reports what is wrong.

    Args:
        video: a file, or frames (T, H, W, 3) uint8.
    """
    if isinstance(video, np.ndarray):
        frames = video[:LOOK_FRAMES]
    else:
        frames = next(iter_video(video, FPS, MAX_SIDE, LOOK_FRAMES))
    try:
        track = find_faces(ArrayFrames(frames), FPS)[0]
    except FaceError:
        return FILMED
    index = np.linspace(0, len(frames) - 1, min(PICTURES, len(frames))).round().astype(int)
    drawn = flat_fraction(crop_face(frames[index], track[index], SIDE)) >= FLAT_FRACTION
    return DRAWN if drawn else FILMED
