"""Mouth localisation error of face detectors relative to dlib's 68 landmarks, on clips of real people.

Every fifth frame of each clip is measured. The error is the distance of the mouth's centre from that of dlib, divided
by the distance of eyes and mouth: its root mean square over all frames, and its systematic part. A face that is not
found, or found elsewhere, is a miss. Seconds are processor time. Needs setup.sh landmarks and faces.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine.arguments import within
from engine.errors import UserError
from engine.faces.clip import ClipFrames, find_faces
from engine.faces.detectors import FaceDetector, HaarDetector, five_points
from engine.faces.landmarks import Dlib68
from engine.faces.mtcnn import MTCNNDetector
from engine.faces.track import DETECT_EVERY
from hicodit.settings import VIDEO_SUFFIXES

FPS = 25.0
DETECTORS: dict[str, Callable[[], FaceDetector]] = {"cascade": HaarDetector, "mtcnn": MTCNNDetector}
ELSEWHERE = 1.0  # error from which on another face, or none, was found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clips", type=Path, nargs="+", required=True, help="clips, or folders of them")
    parser.add_argument("--most", type=within(1), default=6, help="number of clips of each folder, evenly spread")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    finder = Dlib68()
    detectors = {name: make() for name, make in DETECTORS.items()}
    errors: dict[str, list[np.ndarray | None]] = {name: [] for name in (*detectors, "cascade, smoothed")}
    seconds = dict.fromkeys(("dlib68", *detectors), 0.0)
    dlib_frames = 0
    for path in find_clips(args.clips, args.most):
        frames = ClipFrames(path, FPS)
        track = find_faces(frames, FPS)[0]
        begin = time.process_time()
        landmarks = list(finder(frames, track))
        seconds["dlib68"] += time.process_time() - begin
        dlib_frames += len(landmarks)
        pictures = np.concatenate(list(frames))
        for i in range(0, len(pictures), DETECT_EVERY):
            if landmarks[i] is None:
                continue
            true = five_points(landmarks[i])
            errors["cascade, smoothed"].append(mouth_error(track.points[i], true))
            for name, detector in detectors.items():
                begin = time.process_time()
                faces = detector(pictures[i])
                seconds[name] += time.process_time() - begin
                errors[name].append(nearest_error(faces, true))
    yield {"detector": "dlib68", "frames_per_second": dlib_frames / seconds["dlib68"]}, "dlib68"
    for name, found in errors.items():
        values = np.array([error for error in found if error is not None]).reshape(-1, 2)
        if not len(values):
            yield {"detector": name, "frames": len(found), "misses": len(found)}, f"{name}: found no face"
            continue
        squares = (values**2).sum(1)
        row = {
            "detector": name,
            "frames": len(found),
            "misses": len(found) - len(values),
            "mouth_error_rms": float(np.sqrt(squares.mean())),
            "mouth_error_p95": float(np.quantile(np.sqrt(squares), 0.95)),
            "mouth_error_systematic": values.mean(0).tolist(),
        }
        if name in seconds:
            row["frames_per_second"] = len(found) / seconds[name]
        line = f"{name}: mouth error {row['mouth_error_rms']:.1%} rms, {row['misses']} of {row['frames']} frames missed"
        yield row, line


def find_clips(paths: list[Path], most: int) -> list[Path]:
    """Return the clips among `paths`, and up to `most` evenly spaced ones of each folder."""
    clips = []
    for path in paths:
        files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.suffix.lower() in VIDEO_SUFFIXES)
        if not files:
            raise UserError(f"--clips {path} is neither a clip nor a folder of clips")
        chosen = np.linspace(0, len(files) - 1, min(most, len(files))).round().astype(int)
        clips += [files[i] for i in chosen]
    return clips


def mouth_error(points: np.ndarray, true: np.ndarray) -> np.ndarray | None:
    """Return the error (2,) of the mouth position, relative to the distance between eyes and mouth.

    None if it is another face.
    """
    scale = np.linalg.norm(true[3:].mean(0) - true[:2].mean(0))
    error = (points[3:].mean(0) - true[3:].mean(0)) / scale
    return error if np.linalg.norm(error) < ELSEWHERE else None


def nearest_error(faces: np.ndarray, true: np.ndarray) -> np.ndarray | None:
    """Return the smallest error of the faces (n, 14) that were found in a frame; None if there is none."""
    errors = [mouth_error(face[4:].reshape(5, 2), true) for face in faces]
    errors = [error for error in errors if error is not None]
    return min(errors, key=np.linalg.norm, default=None)
