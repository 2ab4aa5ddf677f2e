"""The two bundled releases, one for cartoon faces and one for real ones, and the choice between them.

Axes: T frames, H height, W width, n images, S image side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine.faces.clip import ArrayFrames, find_faces
from engine.faces.crops import crop_face
from engine.faces.track import FaceError
from engine.media.video import iter_video
from hicodit.conditions.types import FPS
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import BUNDLED

DRAWN = BUNDLED
FILMED = BUNDLED.parent / "hicodit_grid"
LOOK_FRAMES = 32  # of the beginning of a clip, that are looked at
PICTURES = 4
SIDE = 64  # pixels of the face crops
MAX_SIDE = 640  # pixels of the frames
STEP = 1.5  # of 255: neighbouring pixels that differ by less are flat
FLAT_FRACTION = 0.4  # cartoon faces have 0.46 or more, those of GRID at most 0.35


def flat_fraction(faces: np.ndarray) -> float:
    """Return the fraction of horizontal neighbours in pictures (n, S, S, 3) uint8 that are equally bright.

    A cartoon face has areas of one colour; skin, and the noise of a camera, have hardly any.
    """
    grey = faces.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return float((np.abs(np.diff(grey, axis=-1)) < STEP).mean())


def bundled_weights(video: str | Path | np.ndarray) -> Path:
    """Return the folder of the bundled release that suits a clip, by its first faces.

    A clip without a face gets the release for real faces: generation then reports what is wrong.

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


class PipelineChooser:
    """Pipelines of releases, each loaded once, and the choice of the one for a clip.

    Args:
        load: makes the pipeline of a release folder.
        weights: the release for all clips; None: for each clip, the bundled one that suits its face.
    """

    def __init__(self, load: Callable[[str | Path], HiCoDiTPipeline], weights: str | Path | None = None) -> None:
        self.load = load
        self.weights = weights
        self.loaded: dict[str | Path, HiCoDiTPipeline] = {}
        self._lock = threading.Lock()  # requests of a server choose at once

    @classmethod
    def of(cls, pipeline: HiCoDiTPipeline) -> PipelineChooser:
        """Return a chooser that has this pipeline for all clips."""
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
        """Return the pipeline for a clip: a file, or frames (T, H, W, 3) uint8."""
        return self.pipeline(self.weights or bundled_weights(video))

    def load_all(self) -> list[HiCoDiTPipeline]:
        """Load and return all pipelines that may be chosen."""
        return [self.pipeline(weights) for weights in ([self.weights] if self.weights else [DRAWN, FILMED])]
