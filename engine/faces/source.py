"""Choice of face detector and landmarks, shared by shard preparation, releases and inference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.errors import UserError
from engine.faces.detectors import FaceDetector, YuNetDetector
from engine.faces.track import LandmarkFinder

CASCADE = "cascade"  # source of shards and releases that do not record one
FILES = "files"


@dataclass(frozen=True)
class FaceSource:
    """A face detector and, optionally, a landmark source for every frame.

    Attributes:
        detector: face detector. None: OpenCV's cascade, including its search for tilted and small heads.
        landmarks: a landmark finder, a file or folder of landmarks, or None for the points of the detector.
        name: name of detector and landmarks, such as `cascade` or `cascade+dlib68`, which shards and releases record.
    """

    detector: FaceDetector | None = None
    landmarks: LandmarkFinder | Path | None = None
    name: str = CASCADE

    @classmethod
    def from_settings(cls, detector: str | None = None, face_landmarks: str | None = None) -> FaceSource:
        """Create the source for the settings `detector` and `face_landmarks`. None: the cascade, without landmarks.

        Raises:
            UserError: If a package or file is missing.
        """
        if detector in (None, CASCADE):
            found = None
            name = CASCADE
        elif detector == "mtcnn":
            found = _mtcnn()
            name = "mtcnn"
        else:
            found = YuNetDetector(detector)
            name = "yunet"
        if face_landmarks is None:
            return cls(found, None, name)
        from engine.faces.landmarks import SUFFIXES, Dlib68, nearest_face  # most sources have no landmarks

        if face_landmarks == "dlib68":
            return cls(found, Dlib68(), f"{name}+dlib68")
        if face_landmarks == "mtcnn":
            finder = found if name == "mtcnn" else _mtcnn()
            return cls(found, partial(nearest_face, finder), f"{name}+mtcnn")
        if face_landmarks == "yunet":
            if name != "yunet":
                raise UserError(
                    "face_landmarks=yunet needs the network's file: detector=face_detection_yunet_2023mar.onnx"
                )
            return cls(found, partial(nearest_face, found), "yunet+yunet")
        if not Path(face_landmarks).exists():
            raise UserError(
                f"face_landmarks={face_landmarks}: no such file; use dlib68, mtcnn, yunet, or a "
                f"{', '.join(SUFFIXES)} file"
            )
        return cls(found, Path(face_landmarks), FILES)

    @classmethod
    def from_name(cls, name: str, trained: str | Path) -> FaceSource:
        """Create the source with which the release `trained` was trained.

        Raises:
            UserError: If a package is missing, or the source requires a file of the user.
        """
        before = f"{trained} was trained on faces found by {name}"
        if name == FILES:
            raise UserError(f"{before}: set face_landmarks=FOLDER with those of the clips, or dlib68")
        detector, _, landmarks = name.partition("+")
        if detector == "yunet":
            more = " face_landmarks=yunet" if landmarks == "yunet" else ""
            raise UserError(f"{before}: set detector=face_detection_yunet_2023mar.onnx{more}")
        if detector not in (CASCADE, "mtcnn") or landmarks not in ("", "dlib68", "mtcnn"):
            raise UserError(f"{before}, which is unknown to this version: set detector= and face_landmarks=")
        try:
            return cls.from_settings(detector, landmarks or None)
        except UserError as error:
            raise UserError(f"{before}: {error}") from error


def _mtcnn() -> FaceDetector:
    from engine.faces.mtcnn import MTCNNDetector

    return MTCNNDetector()
