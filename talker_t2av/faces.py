"""The square of a video or picture that the motion codec gets: round the face, if one is found.

Axes: F frames, H height, W width, S side of the square.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from engine.errors import UserError
from engine.faces.clip import ArrayFrames, ClipFrames, find_faces, place_face
from engine.faces.crops import centre_square, portrait_square
from engine.faces.track import FaceError, read_boxes
from engine.media.ffmpeg import check_readable, probe
from engine.media.video import iter_video
from engine.progress import stage, watched
from engine.settings import LIMITS
from talker_t2av.model import FPS
from talker_t2av.settings import is_picture

SEARCHED = 10 * FPS  # frames of a reference that are searched for the face, even if only one of them is used


@dataclass(frozen=True)
class Square:
    """Position of the crop, the same in all frames of a file, as LIA-X needs it.

    Attributes:
        left, top, side: in pixels of the picture as it is shown.
        first: number of the first frame that shows the face.
        remark: a note to the user, or "".
    """

    left: int
    top: int
    side: int
    first: int = 0
    remark: str = ""

    def cut(self, frames: np.ndarray) -> np.ndarray:
        """Cut frames (F, H, W, 3) -> (F, S, S, 3)."""
        return frames[:, self.top : self.top + self.side, self.left : self.left + self.side]


def find_square(path: str | Path, count: int, crop: str = "face", face_box: str | None = None) -> Square:
    """Find the square round the face in the first `count` frames of a video, or in a picture.

    If no face is found, as in a drawing, it is the largest centred square, and `remark` says so.

    Args:
        crop: "face", or "centre" for the largest centred square without detection.
        face_box: position of the face in the form of `engine.faces.track.read_boxes`.
    """
    still, count = is_picture(path), max(count, SEARCHED)
    clip = ArrayFrames(read_picture(path)) if still else ClipFrames(path, float(FPS), frames=count)
    height, width = clip.display_size
    if crop == "centre" and face_box is None:
        return Square(*centre_square(height, width))
    frames = 1 if still else min(count, round(probe(path).seconds * FPS)) or None
    try:
        with stage(f"{Path(path).name}: finding the face", frames, "frames"):
            if face_box is not None:
                track = place_face(clip, read_boxes(face_box), float(FPS))
            else:
                track = find_faces(clip, float(FPS))[0]
    except FaceError as error:
        if face_box is not None:
            raise UserError(f"{path}: {error}") from error
        return Square(*centre_square(height, width), remark=f"{path}: {error}; its middle is used as the face")
    box = np.median(track.boxes[track.seen], axis=0) * (max(height, width) / max(clip.size))
    return Square(*portrait_square(box, height, width), first=int(track.seen.argmax()))


def read_square(path: str | Path, square: Square, count: int, start: int = 0) -> Iterator[np.ndarray]:
    """Read the square of `count` frames of a video from frame `start` on, or of a picture: blocks (n, S, S, 3) uint8.

    There are fewer frames if the video ends before.
    """
    if is_picture(path):
        yield square.cut(read_picture(path))
        return
    position = 0
    for block in watched(iter_video(path, float(FPS), block=min(start + count, 64))):
        part = block[max(0, start - position) : max(0, start + count - position)]
        if len(part):
            yield square.cut(part)
        position += len(block)
        if position >= start + count:
            break


def read_picture(path: str | Path) -> np.ndarray:
    """Read a picture file as (1, H, W, 3) uint8 RGB."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(check_readable(path)) as header:
            pixels = math.prod(header.size)
    except Image.DecompressionBombError:  # of far more
        pixels = math.inf
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error})") from error
    if pixels > LIMITS.picture_pixels:
        raise UserError(f"{path} has more than {LIMITS.picture_pixels:,} pixels (limits.picture_pixels): scale it down")
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise UserError(f"{path} cannot be read as a picture")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)[None]
