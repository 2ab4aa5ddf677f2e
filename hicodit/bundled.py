"""The two bundled releases, for cartoon faces and for real faces, and the selection between them.

Axes: T frames, H height, W width, n images, S image side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine.faces.clip import MAX_SIDE, ArrayFrames, find_faces
from engine.faces.crops import crop_face
from engine.faces.track import FaceError
from engine.media.video import iter_video
from hicodit.conditions.types import FPS
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import BUNDLED

CARTOON_RELEASE = BUNDLED  # release for cartoon faces
REAL_RELEASE = BUNDLED.parent / "hicodit_grid"  # release for real faces
LOOK_FRAMES = 32  # number of frames at the start of a clip that are examined
FRAMES = 4  # number of face crops among them, evenly spaced, whose texture is measured
SIDE = 64  # side of the face crops in pixels
STEP = 1.5  # threshold out of 255: neighbouring pixels that differ by less count as flat
FLAT_FRACTION = 0.4  # cartoon faces have 0.46 or more, those of GRID at most 0.35


def flat_fraction(faces: np.ndarray) -> float:
    """Return the fraction of horizontally adjacent pixels in images (n, S, S, 3) uint8 that have equal brightness.

    Cartoon faces have areas of constant colour, in contrast to skin with camera noise.
    """
    grey = faces.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return float((np.abs(np.diff(grey, axis=-1)) < STEP).mean())


def bundled_weights(video: str | Path | np.ndarray) -> Path:
    """Return the folder of the bundled release for a clip, selected by the faces in its first frames.

    For clips without a face, the release for real faces is returned; generation then reports the error.

    Args:
        video: video file, or frames (T, H, W, 3) uint8.
    """
    if isinstance(video, np.ndarray):
        frames = video[:LOOK_FRAMES]
    else:
        frames = next(iter_video(video, FPS, MAX_SIDE, LOOK_FRAMES))
    try:
        track = find_faces(ArrayFrames(frames), FPS)[0]
    except FaceError:
        return REAL_RELEASE
    index = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)
    drawn = flat_fraction(crop_face(frames[index], track[index], SIDE)) >= FLAT_FRACTION
    return CARTOON_RELEASE if drawn else REAL_RELEASE


class PipelineChooser:
    """Loads pipelines of releases on demand and selects the one for a clip.

    Args:
        load: creates the pipeline of a release folder.
        weights: release for all clips. None selects a bundled release by the face of each clip.
    """

    def __init__(self, load: Callable[[str | Path], HiCoDiTPipeline], weights: str | Path | None = None) -> None:
        self.load = load
        self.weights = weights
        self.loaded: dict[str | Path, HiCoDiTPipeline] = {}
        self._lock = threading.Lock()  # requests of a server choose concurrently

    @classmethod
    def of(cls, pipeline: HiCoDiTPipeline) -> PipelineChooser:
        """Return a chooser that uses the given pipeline for all clips."""
        chooser = cls(lambda _: pipeline, "given")
        chooser.load_all()
        return chooser

    def pipeline(self, weights: str | Path) -> HiCoDiTPipeline:
        """Return the pipeline of a release."""
        with self._lock:
            if weights not in self.loaded:
                self.loaded[weights] = self.load(weights)
            return self.loaded[weights]

    def for_clip(self, video: str | Path | np.ndarray) -> HiCoDiTPipeline:
        """Return the pipeline for a clip: a video file, or frames (T, H, W, 3) uint8."""
        return self.pipeline(self.weights or bundled_weights(video))

    def load_all(self) -> list[HiCoDiTPipeline]:
        """Load and return all pipelines that can be selected."""
        return [
            self.pipeline(weights) for weights in ([self.weights] if self.weights else [CARTOON_RELEASE, REAL_RELEASE])
        ]
