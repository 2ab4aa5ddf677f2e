"""The stage that tracks the face; in a file of its own, as the packages of the networks take long to load."""

from __future__ import annotations

from corpora.preparation.clip import FPS, Stage, WorkItem
from engine.faces.clip import find_face
from engine.faces.detectors import YuNetDetector


class Face(Stage):
    """Tracks a face through the frames; a clip that does not show one for long enough is rejected.

    Args:
        detector: the file face_detection_yunet_2023mar.onnx; None: OpenCV's cascade, also tilted and fine.
        face: of several faces: largest, central, or a number by size from 1 on.
    """

    needs = "frames"
    reusable = False

    def __init__(self, detector: str | None = None, face: str | int = "largest") -> None:
        self.detector = YuNetDetector(detector) if detector else None
        self.face = face

    def __call__(self, clip: WorkItem) -> None:
        clip.track = find_face([clip.frames], FPS, self.face, self.detector)
