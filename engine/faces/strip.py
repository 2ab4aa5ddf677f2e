"""Debug files of a face track: an image for visual inspection, and the boxes and landmarks as JSON.

Axes: T frames, H height, W width, S image side.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from engine.errors import UserError
from engine.faces.track import FaceTrack
from engine.files import atomic_output, write_json

COLUMNS = 10  # number of frames that are shown
SIDE = 192  # width of a frame in pixels
GAP = 4  # gap between two frames in pixels
BAR = 14  # height of the bar, in pixels
LINE = 24  # height of a line of text, in pixels
CLOSE = 1.5  # side of the close-up, relative to the face box
SEEN = (60, 200, 90)
UNSEEN = (230, 60, 60)
GREY = (40, 40, 40)
WHITE = (255, 255, 255)


class Strip:
    """Ten frames of a clip: the frame with the face box, the face with its points, and the mouth crop.

    The title states how much of the clip shows the face. A bar below covers the whole clip: green where the face is
    detected, red where it is not. The frames are marked in the same colours.
    """

    def __init__(self, track: FaceTrack, fps: float) -> None:
        self.track = track
        self.fps = fps
        self.picks = set(np.linspace(0, len(track) - 1, COLUMNS).round().astype(int).tolist())
        self.columns: list[np.ndarray] = []

    def add(self, frames: np.ndarray, mouth: np.ndarray, start: int) -> None:
        """Add the next block of frames (n, H, W, 3), from frame `start` on, and its mouth crops (n, S, S)."""
        for i in sorted(self.picks & set(range(start, start + len(frames)))):
            frame = frames[i - start]
            part = self.track[i]
            colour = SEEN if part.seen else UNSEEN
            x, y, w, h = part.boxes
            scale = SIDE / frame.shape[1]
            size = SIDE, max(1, round(SIDE * frame.shape[0] / frame.shape[1]))
            whole = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
            corners = np.round(np.array([x, y, x + w, y + h]) * scale).astype(int).tolist()
            cv2.rectangle(whole, corners[:2], corners[2:], colour, 2)
            _write(whole, f"{i / self.fps:.1f} s" + ("" if part.seen else " not seen"), (5, 15))

            scale = SIDE / (CLOSE * w)
            shift = SIDE / 2 - scale * np.array([x + w / 2, y + h / 2])
            matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
            close = cv2.warpAffine(frame, matrix, (SIDE, SIDE), flags=cv2.INTER_AREA)
            radius = 3 if len(part.best_points) == 5 else 1
            for point in np.round(part.best_points * scale + shift).astype(int).tolist():
                cv2.circle(close, point, radius, colour, -1, cv2.LINE_AA)
            lips = cv2.resize(cv2.cvtColor(mouth[i - start], cv2.COLOR_GRAY2RGB), (SIDE, SIDE))
            column = np.concatenate([whole, close, lips])
            column[:, : GAP // 2] = column[:, -GAP // 2 :] = colour
            self.columns.append(column)

    def write(self, path: str | Path) -> None:
        """Write the visualisation as PNG."""
        if Path(path).suffix.lower() != ".png":
            raise UserError(f"cannot write {path}: the image of the face track must be a .png")
        picture = np.concatenate(self.columns, 1)
        width = picture.shape[1]
        seconds = len(self.track) / self.fps
        head = np.full((LINE, width, 3), GREY, np.uint8)
        unseen = self.track.unseen(self.fps)
        text = f"face seen in {self.track.coverage:.0%} of {seconds:.1f} s" + (f"; not at {unseen}" if unseen else "")
        _write(head, f"{text}.  Top to bottom: frame, face with landmarks, mouth crop", (5, 17))
        index = np.arange(width) * len(self.track) // width
        bar = np.where(self.track.seen[index, None], SEEN, UNSEEN).astype(np.uint8)
        picture = np.concatenate([head, picture, np.repeat(bar[None], BAR, 0)])
        with atomic_output(path) as partial:
            partial.write_bytes(cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes())


def _write(picture: np.ndarray, text: str, position: tuple[int, int]) -> None:
    """Draw white text with a black outline, which is readable on any background."""
    for colour, width in (((0, 0, 0), 3), (WHITE, 1)):
        cv2.putText(picture, text, position, cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, width, cv2.LINE_AA)


def write_faces(path: str | Path, track: FaceTrack, mouth: np.ndarray, side: int, fps: float) -> None:
    """Write a track as JSON: box and landmarks of each frame, and `mouth` (T, 2, 3), the affine transforms from frames
    to the mouth crop of `side` pixels.
    """
    columns = (values.round(4).tolist() for values in (track.boxes, track.best_points, mouth))
    frames = [
        {"box": box, "points": points, "seen": seen, "mouth": matrix}
        for box, points, matrix, seen in zip(*columns, track.seen.tolist(), strict=True)
    ]
    write_json(path, {"fps": fps, "mouth_side": side, "frames": frames}, indent=None)
