"""A picture of what face tracking found, for a person to check.

Axes: T frames, H height, W width, S picture side.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from engine.errors import UserError
from engine.faces.track import FaceTrack
from engine.files import atomic_output

COLUMNS, SIDE, BAR = 10, 160, 12  # pictures of the clip, their width, height of the bar, in pixels
SEEN, UNSEEN = (70, 170, 90), (200, 60, 60)


class Strip:
    """Frames of the clip with box and points, the mouth pictures under them, and a bar: green where a face is seen."""

    def __init__(self, track: FaceTrack, fps: float) -> None:
        self.track, self.fps = track, fps
        self.picks = set(np.linspace(0, len(track) - 1, COLUMNS).round().astype(int).tolist())
        self.columns: list[np.ndarray] = []

    def add(self, frames: np.ndarray, mouth: np.ndarray, start: int) -> None:
        """The next block of frames (n, H, W, 3), from frame `start` on, and its mouth pictures (n, S, S)."""
        for i in sorted(self.picks & set(range(start, start + len(frames)))):
            frame, part = frames[i - start].copy(), self.track[i]
            colour = SEEN if part.seen else UNSEEN
            width = max(1, round(frame.shape[1] / SIDE))
            x, y, w, h = part.boxes
            cv2.rectangle(frame, (round(x), round(y)), (round(x + w), round(y + h)), colour, width)
            for px, py in part.points:
                cv2.circle(frame, (round(px), round(py)), 2 * width, colour, -1)
            size = (SIDE, max(1, round(SIDE * frame.shape[0] / frame.shape[1])))
            picture = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
            label = f"{i / self.fps:.1f} s"
            cv2.putText(picture, label, (5, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 3, cv2.LINE_AA)
            cv2.putText(picture, label, (5, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1, cv2.LINE_AA)
            lips = cv2.resize(cv2.cvtColor(mouth[i - start], cv2.COLOR_GRAY2RGB), (SIDE, SIDE))
            self.columns.append(np.concatenate([picture, lips]))

    def write(self, path: str | Path) -> None:
        """Write the PNG.

        Raises:
            UserError: it cannot be written, or has another suffix than .png.
        """
        if Path(path).suffix.lower() != ".png":
            raise UserError(f"cannot write {path}: the picture of the face track is a .png")
        picture = np.concatenate(self.columns, 1)
        where = np.arange(picture.shape[1]) * len(self.track) // picture.shape[1]
        bar = np.where(self.track.seen[where, None], SEEN, UNSEEN).astype(np.uint8)
        picture = np.concatenate([picture, np.repeat(bar[None], BAR, 0)])
        with atomic_output(path) as partial:
            cv2.imwrite(str(partial), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
