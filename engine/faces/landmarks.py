"""Landmarks of a tracked face in every frame: dlib's 68, the five of a detector, or those of a file.

Axes: T frames, P landmarks, n frames of a block, H height, W width. Landmarks are (x, y) in pixels: 68 numbered as in
iBUG 300-W (27-35 nose, 36-41 and 42-47 eyes, 48-67 mouth), or the five of `engine.faces.detectors`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from engine.errors import UserError, package_folder, require
from engine.faces.detectors import POINTS, FaceDetector
from engine.faces.track import DETECT_EVERY, FaceError, FaceTrack, face_distance, stack_landmarks
from engine.untrusted import read_json

SIDE = 256  # size of the tracked box in pixels, within an image of twice the size that dlib processes
USUAL = SIDE * np.array([1.0, 1.07, 0.76])  # mean centre (x, y) and side of dlib's box in that image
TRIES = np.array([0.92, 1.0, 1.08])  # scales of dlib's box; the median of the predictions is more stable
MAX_BYTES = 2**28  # maximum size of a landmark file in bytes
MAX_FRAMES = 200_000  # an hour at 25 frames per second has 90,000
SUFFIXES = (".json", ".npz", ".pkl")


def load_dlib() -> tuple[Callable, Callable]:
    """Return dlib's frontal face detector and its predictor of 68 landmarks."""
    dlib = require("dlib", "dlib", "landmarks")
    predictor = dlib.shape_predictor(_dlib_file("shape_predictor_68_face_landmarks.dat"))
    return dlib.get_frontal_face_detector(), predictor


def load_face_recogniser() -> Any:
    """Return dlib's face recognition network, whose `compute_face_descriptor` embeds a face with 68 landmarks."""
    dlib = require("dlib", "dlib", "landmarks")
    return dlib.face_recognition_model_v1(_dlib_file("dlib_face_recognition_resnet_model_v1.dat"))


def _dlib_file(name: str) -> str:
    """Return the path of a file of `face_recognition_models`, a package that imports outdated modules."""
    return str(package_folder("face_recognition_models", "face_recognition_models", "landmarks") / "models" / name)


class Dlib68:
    """dlib's 68 landmarks, as in AV-HuBERT's preprocessing. Tilted heads are rotated upright first.

    The landmark predictor was trained on boxes of dlib's frontal detector, which runs on every fifth frame, near the
    tracked face only. In between, the position of its box relative to the tracked box is interpolated.

    Weights: `shape_predictor_68_face_landmarks.dat` (Kazemi and Sullivan 2014, trained on iBUG 300-W: research only).
    """

    def __init__(self) -> None:
        self.detect, self.predict = load_dlib()
        self.rectangle = require("dlib", "dlib", "landmarks").rectangle

    def __call__(self, blocks: Iterable[np.ndarray], track: FaceTrack) -> Iterator[np.ndarray | None]:
        boxes = {i: box for i, picture, _ in _upright(blocks, track, DETECT_EVERY) for box in self._look(picture)}
        index = list(boxes) or [0]
        xs, ys, sides = np.array(list(boxes.values()) or [USUAL]).T
        count = 0
        for i, picture, matrix in _upright(blocks, track, 1):
            yield from [None] * (i - count)
            x = np.interp(i, index, xs)
            y = np.interp(i, index, ys)
            side = np.interp(i, index, sides)
            points = []
            for half in side / 2 * TRIES:
                box = self.rectangle(*(round(value) for value in (x - half, y - half, x + half, y + half)))
                points.append([(p.x, p.y) for p in self.predict(picture, box).parts()])
            yield (np.median(points, 0) - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T
            count = i + 1
        yield from [None] * (len(track) - count)

    def _look(self, picture: np.ndarray) -> list[np.ndarray]:
        """Return centre x, y and side of the dlib box nearest to its usual position; empty if there is none."""
        boxes = [
            np.array([r.left() + r.right(), r.top() + r.bottom(), 2 * r.width()], np.float64)
            for r in self.detect(cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
        ]
        near = [box for box in boxes if np.abs(box - USUAL).max() < SIDE / 2]
        return sorted(near, key=lambda box: np.abs(box - USUAL).max())[:1]


def _upright(
    blocks: Iterable[np.ndarray], track: FaceTrack, every: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield index, image (2 `SIDE`, 2 `SIDE`, 3) and transform (2, 3) of every `every`-th frame in which the face is
    seen.

    The tracked box is the central half of the image, rotated upright.
    """
    roll = track.roll
    for i, frame in enumerate(frame for block in blocks for frame in block):
        if i % every == 0 and track.seen[i]:
            x, y, w, h = track.boxes[i]
            cos, sin = SIDE / max(w, h) * np.array([np.cos(roll[i]), np.sin(roll[i])])
            turn = np.array([[cos, sin], [-sin, cos]])
            matrix = np.column_stack([turn, SIDE - turn @ (x + w / 2, y + h / 2)])
            yield i, cv2.warpAffine(frame, matrix, (2 * SIDE, 2 * SIDE), borderMode=cv2.BORDER_REPLICATE), matrix


def nearest_face(detector: FaceDetector, blocks: Iterable[np.ndarray], track: FaceTrack) -> Iterator[np.ndarray | None]:
    """Yield the five points of the detected face that is nearest to the tracked one."""
    for i, frame in enumerate(frame for block in blocks for frame in block):
        faces = detector(frame) if track.seen[i] else ()
        best = min(faces, key=lambda face: face_distance(track.boxes[i], face, 0.4), default=None)
        usable = best is not None and face_distance(track.boxes[i], best, 0.4) < 1
        yield best[POINTS].reshape(5, 2) if usable else None


def read_landmarks(path: Path, clip: str) -> tuple[np.ndarray, np.ndarray]:
    """Read landmarks (T, P, 2), in pixels of the clip as shown by a player at 25 frames per second, and their mask
    (T,).

    A JSON file contains a list with an entry per frame, each a list of [x, y] or null, or is a NAME_face.json written
    by `debug=true`. An npz file contains one array (T, P, 2) with NaN for missing frames. A pickle contains a list of
    arrays or None, as in Auto-AVSR's landmarks of LRS3.

    Args:
        path: the file, or a folder with the same layout and file names as the clips.
        clip: path of the clip relative to its folder.
    """
    if path.is_dir():
        paths = [(path / clip).with_suffix(suffix) for suffix in SUFFIXES]
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            raise FaceError(f"no landmarks: looked for {paths[0]} (or {', '.join(SUFFIXES[1:])})")
    try:
        size = path.stat().st_size
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                size = sum(info.file_size for info in archive.infolist())
        if size > MAX_BYTES:
            raise ValueError(f"the file exceeds {MAX_BYTES:,} bytes")
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                (frames,) = (arrays[name] for name in arrays.files)
            frames = [points if np.isfinite(points).all() else None for points in frames]
        elif path.suffix == ".pkl":
            from engine.torch_files import read_pickled_arrays  # imports PyTorch

            frames = read_pickled_arrays(path)
        else:
            frames = read_json(path)
            if isinstance(frames, dict):
                frames = [frame["points"] if frame.get("seen", True) else None for frame in frames["frames"]]
        shapes = {np.shape(points) for points in frames if points is not None}
        if len(frames) > MAX_FRAMES or len(shapes) > 1 or not shapes <= {(68, 2), (5, 2)}:
            raise ValueError(f"{len(frames)} frames with landmarks of shapes {sorted(shapes)[:3]}")
        landmarks, present = stack_landmarks(frames)
        if not np.isfinite(landmarks).all():
            raise ValueError("a number that is not finite")
    except UserError:
        raise
    except Exception as error:  # a damaged file or foreign contents can raise nearly anything
        raise UserError(f"{path} does not contain 68 or 5 landmarks (x, y) per frame ({error})") from error
    return landmarks, present
