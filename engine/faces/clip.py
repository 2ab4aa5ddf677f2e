"""Face detection in a clip whose frames are decoded on demand.

Axes: T frames, H height, W width, n frames of a block, P landmarks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engine.faces.detectors import FaceDetector, HaarDetector, middle_of
from engine.faces.track import Face, FaceError, FaceTrack, fill_landmarks, landmark_track, track_faces, track_of_boxes
from engine.media.video import iter_video
from engine.progress import watched

MAX_SIDE = 640  # longer side of frames for face detection in pixels; larger frames are scaled down
GOOD_WIDTH = 140  # face size in pixels beyond which crops do not improve: its size in AV-HuBERT's pose
KEPT = 128 * 2**20  # bytes of decoded frames to keep: 1.5 min at 128 x 128, 7 s at 640 x 360
MISFIT = 5  # tolerated difference in length between landmarks and clip, in frames
# frames of the beginning that show how the head stands, and their distance
LOOKS = 8
LOOK_EVERY = 31
SURE = 14  # number of overlapping cascade detections of a face; false positives have up to 13
TILTS = (-30, 30)  # rotation of the image, in degrees anticlockwise
TURNS = {90: "on its side", 180: "upside down", 270: "on its side"}


class ClipFrames:
    """Iterable over the frames of a video file, in blocks (n, H, W, 3). Each iteration starts from the beginning.

    A clip of up to `KEPT` bytes is decoded once and kept in memory. A longer clip is decoded on each iteration, so that
    memory stays constant.

    Args:
        path: a video file.
        fps: frames per second.
        max_side: larger frames are scaled down to this longer side in pixels.
        frames: number of frames to read; None: all.
        span: start and end in seconds of the part to read; None: the whole file.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float,
        max_side: int = MAX_SIDE,
        frames: int | None = None,
        span: tuple[float, float] | None = None,
    ) -> None:
        self.path = path
        self.fps = fps
        self.max_side = max_side
        self.frames = frames
        self.span = span
        self.size = (0, 0)  # height and width of the frames, known after the first block
        self._decoded: list[np.ndarray] | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        return watched(self._blocks())

    def _blocks(self) -> Iterator[np.ndarray]:
        if self._decoded is not None:
            yield from self._decoded
            return
        blocks = []
        size = 0
        remaining = self.frames
        for block in iter_video(self.path, self.fps, self.max_side, span=self.span):
            if remaining is not None:
                block = block[:remaining]
                remaining -= len(block)
            self.size = block.shape[1:3]
            size += block.nbytes
            if size <= KEPT:
                blocks.append(block)
            else:
                blocks.clear()
            yield block
            if remaining == 0:
                break
        if size <= KEPT:
            self._decoded = blocks

    @cached_property
    def display_size(self) -> tuple[int, int]:
        """Height and width of the frames as shown by a player."""
        return next(iter_video(self.path, self.fps, block=1, span=self.span)).shape[1:3]

    def sharper(self, track: FaceTrack) -> tuple[ClipFrames, FaceTrack]:
        """Return the frames and their track, or higher-resolution frames if the face is small and the file has a higher
        resolution.
        """
        width = float(np.median(track.boxes[track.seen, 2]))
        if width > 0.7 * GOOD_WIDTH or max(self.size) < self.max_side:
            return self, track
        side = min(max(self.display_size), round(self.max_side * GOOD_WIDTH / width))
        if side <= self.max_side:
            return self, track
        return ClipFrames(self.path, self.fps, side, self.frames, self.span), track.scaled(side / self.max_side)


class ArrayFrames(ClipFrames):
    """Frames (T, H, W, 3) in memory, as one block. There is no higher resolution.

    Args:
        display_size: height and width of the frames as shown by a player. None: those of the array.
    """

    max_side = math.inf

    def __init__(self, frames: np.ndarray, display_size: tuple[int, int] | None = None) -> None:
        self.array = frames
        self.size = frames.shape[1:3]
        self.display_size = display_size or self.size

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self.array


def find_faces(
    clip: Iterable[np.ndarray],
    fps: float,
    face: Face = "largest",
    detector: FaceDetector | None = None,
    wave: np.ndarray | None = None,
) -> list[FaceTrack]:
    """Find the requested face, or all faces, with a detector or OpenCV's cascade.

    If the cascade is not confident, tilted and very small heads are searched, too.

    Args:
        clip: re-iterable over blocks of frames (n, H, W, 3).
        face: see `engine.faces.track.follow_faces`. "speaking" selects the face by
            `engine.faces.speaking.speaking_face`.
        wave: (N,) the clip's audio at 16 kHz, for "speaking".

    Raises:
        FaceError: If the face is visible in too few frames, or the video is rotated.
    """
    tracks = track_faces(clip, detector, fps, face) if detector else _search(clip, fps, face)
    if face == "speaking" and len(tracks) > 1:
        from engine.faces.speaking import speaking_face

        return [tracks[speaking_face(clip, tracks, wave)]]
    return tracks


def _search(clip: Iterable[np.ndarray], fps: float, face: Face) -> list[FaceTrack]:
    """Find faces with OpenCV's cascade: first upright, then tilted, then very small faces."""
    looks: list[np.ndarray] = []
    tracks = None
    error = None

    def noting() -> Iterator[np.ndarray]:
        for block in clip:
            looks.extend(block[::LOOK_EVERY][: LOOKS - len(looks)].copy())  # a few frames of the beginning
            yield block

    try:
        tracks = track_faces(noting(), HaarDetector(), fps, face)
    except FaceError as caught:
        error = caught
    upright = _evidence(looks, 0)
    if tracks is not None and upright >= SURE:
        return tracks
    others = {angle: _evidence(looks, angle) for angle in (*TILTS, *TURNS)}
    angle = max(others, key=others.__getitem__)
    if others[angle] > max(2 * upright, SURE):
        if angle in TURNS:
            words = f"there is a face {TURNS[angle]}: rotate the video by {angle} degrees anticlockwise first"
            raise FaceError(f"{error}; {words}" if error else words, turn=angle)
        return track_faces(clip, HaarDetector(angle=angle), fps, face)
    if tracks is not None:
        return tracks
    try:
        return track_faces(clip, HaarDetector(tiny=True), fps, face)
    except FaceError:
        raise error from None


def _evidence(looks: list[np.ndarray], angle: float) -> float:
    """Return the confidence of the cascade in frames rotated by `angle`; 0 if most frames have no face."""
    detector = HaarDetector(angle=angle)
    values = [detector.evidence(frame) for frame in looks]
    return float(np.median([v for v in values if v])) if 2 * sum(v > 0 for v in values) >= len(looks) else 0.0


def place_face(clip: ClipFrames, boxes: Any, fps: float) -> FaceTrack:
    """Return the track for boxes given by the user, in pixels of the frames as shown by a player; see
    `track_of_boxes`.
    """
    track = track_of_boxes(boxes, sum(map(len, clip)), fps)
    height, width = clip.display_size
    middle = middle_of(track.boxes)
    outside = ((middle < 0) | (middle > (width, height))).any(1)
    if outside.any():
        box = ",".join(f"{value:g}" for value in track.boxes[outside.argmax()])
        raise FaceError(
            f"face_box={box} at {outside.argmax() / fps:.1f} s is outside the frame of {width} x {height} pixels"
        )
    return track.scaled(clip.size[1] / width)


def place_landmarks(clip: ClipFrames, landmarks: np.ndarray, present: np.ndarray, fps: float) -> FaceTrack:
    """Return the track for landmarks (T, P, 2) given by the user, in pixels of the frames as shown by a player.

    Args:
        present: (T,) bool, True for frames with landmarks.
        fps: frame rate of the clip.

    Raises:
        FaceError: If the number of landmarks does not match the number of frames.
    """
    frames = sum(map(len, clip))
    if abs(len(landmarks) - frames) > MISFIT:
        raise FaceError(f"landmarks of {len(landmarks)} frames, but the clip has {frames} at {fps:g} per second")
    index = np.minimum(np.arange(frames), len(landmarks) - 1)
    track = landmark_track(fill_landmarks(landmarks, present)[index], present[index], fps)
    return track.scaled(clip.size[1] / clip.display_size[1])
