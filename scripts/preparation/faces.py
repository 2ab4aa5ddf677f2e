"""The stage that follows the face; apart from those with networks, whose packages take long to load."""

from __future__ import annotations

from engine.faces.detectors import HaarDetector, YuNetDetector
from engine.faces.track import track_face
from scripts.preparation.clip import FPS, Clip


class Face:
    """Follows a face through the frames; a clip that does not show one for long enough is refused.

    Args:
        detector: the file face_detection_yunet_2023mar.onnx; None: OpenCV's cascade.
        face: of several faces: largest, central, or a number by size from 1 on.
    """

    needs = "frames"

    def __init__(self, detector: str | None = None, face: str | int = "largest") -> None:
        self.detector = HaarDetector() if detector is None else YuNetDetector(detector)
        self.face = face

    def __call__(self, clip: Clip) -> None:
        clip.track = track_face([clip.frames], self.detector, FPS, self.face)
