"""The stage that tracks the face; in a file of its own, as the packages of the networks take long to load."""

from __future__ import annotations

from pathlib import Path

from corpora.preparation.clip import FPS, Step, WorkItem
from engine.errors import UserError
from engine.faces.clip import ClipFrames, find_face, place_landmarks
from engine.faces.detectors import YuNetDetector
from engine.faces.landmarks import add_landmarks, landmark_source, read_landmarks
from engine.faces.track import check_face


class Face(Step):
    """Tracks a face through the frames; a clip that does not show one for long enough is rejected.

    Args:
        detector: the file face_detection_yunet_2023mar.onnx; None: OpenCV's cascade, also tilted and fine.
        face: of several faces: speaking, the one whose mouth goes with the sound, largest, central, left, right, or a
            number by size from 1 on; where the source says where the clip's face is, the one nearest to that place.
        face_landmarks: dlib68, yunet (with `detector`), or a folder of landmark files laid out as the source's clips;
            None: those of the detector.
    """

    needs = "frames"
    reusable = False

    def __init__(
        self, detector: str | None = None, face: str | int = "speaking", face_landmarks: str | None = None
    ) -> None:
        self.detector = YuNetDetector(detector) if detector else None
        check_face(face)
        if face == "all":
            raise UserError("stages.face.face=all: a sample has one face; give speaking, or another choice")
        self.face, self.landmarks = face, landmark_source(face_landmarks, self.detector)

    def __call__(self, clip: WorkItem) -> None:
        if isinstance(self.landmarks, Path):
            if clip.info.span is not None:
                raise UserError("landmarks of whole videos cannot be used for parts of them: leave face_landmarks out")
            size = ClipFrames(clip.path(clip.info.video), FPS).display_size
            clip.track = place_landmarks([clip.frames], *read_landmarks(self.landmarks, clip.info.video), FPS, size)
            return
        clip.track = find_face([clip.frames], FPS, self._which(clip), self.detector, clip.wave16)
        if self.landmarks is not None:
            clip.track = add_landmarks([clip.frames], clip.track, self.landmarks)

    def _which(self, clip: WorkItem) -> str | int | tuple[float, float]:
        """Return the face that the source names by its place in fractions of the picture, else that of the settings."""
        if clip.info.face is None:
            return self.face
        x, y, lines = clip.info.face
        height, width = clip.frames.shape[1:3]
        return (x * height / lines / width, y / lines) if lines else (x, y)
