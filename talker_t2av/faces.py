"""Square crop around the face of a video or image, the input of the motion codec, and pasting of generated faces back
into the image from which they were cropped.

Axes: F frames, H height, W width, S side of the square.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from engine.errors import UserError
from engine.faces.clip import ArrayFrames, ClipFrames, find_faces, place_face
from engine.faces.crops import centre_square, portrait_square
from engine.faces.track import FaceError, FaceTrack, read_boxes
from engine.media.ffmpeg import check_readable, probe
from engine.media.pictures import picture_size
from engine.media.video import iter_video
from engine.progress import stage, watched
from engine.settings import LIMITS
from talker_t2av.model import FPS
from talker_t2av.settings import is_picture

TURNS = {90: "90 degrees anticlockwise", 180: "180 degrees", 270: "90 degrees clockwise"}
SEARCHED = 10 * FPS  # frames of a reference that are searched for a face, even if only one is used
WHOLE = 2**20  # maximum side of a square in pixels
LONGEST = 960  # maximum longer side of a video in pixels; larger images are scaled down
FADE = 0.15  # width of the blended border, as a fraction of the square's side


@dataclass(frozen=True)
class Square:
    """Crop of a file, constant over all frames, as LIA-X requires.

    Attributes:
        left, top, side: crop in pixels of the image as shown by a player, after rotation.
        first: index of the first frame that shows the face.
        remark: a note to the user, or "".
        turn: rotation applied first, in degrees anticlockwise.
    """

    left: int
    top: int
    side: int
    first: int = 0
    remark: str = ""
    turn: int = 0

    def crop(self, frames: np.ndarray) -> np.ndarray:
        """Crop frames (F, H, W, 3) -> (F, S, S, 3)."""
        frames = turned(frames, self.turn)
        return frames[:, self.top : self.top + self.side, self.left : self.left + self.side]


def turned(frames: np.ndarray, degrees: int) -> np.ndarray:
    """Rotate frames (F, H, W, 3) anticlockwise by a multiple of 90 degrees."""
    return np.ascontiguousarray(np.rot90(frames, degrees // 90, (1, 2))) if degrees else frames


def find_square(path: str | Path, count: int, crop: str = "face", face_box: str | None = None) -> Square:
    """Find the square around the face in the first `count` frames of a video, or in an image.

    If no face is found, for example in a drawing, the largest centred square is used, which `remark` states.

    Args:
        crop: "face", or "centre" for the largest centred square without detection.
        face_box: position of the face in the form of `engine.faces.track.read_boxes`.

    Raises:
        UserError: If the file cannot be read, or `face_box` does not fit it.
    """
    if is_picture(path):
        return find_square_of_picture(path, crop, face_box)
    count = max(count, SEARCHED)
    clip = ClipFrames(path, float(FPS), frames=count)
    height, width = clip.display_size
    if crop == "centre" and face_box is None:
        return Square(*centre_square(height, width))
    frames = min(count, round(probe(path).seconds * FPS)) or None
    try:
        with stage(f"{Path(path).name}: finding the face", frames, "frames"):
            if face_box is not None:
                track = place_face(clip, read_boxes(face_box), float(FPS))
            else:
                track = find_faces(clip, float(FPS))[0]
    except FaceError as error:
        if face_box is not None:
            raise UserError(f"{path}: {error}") from error
        return Square(*centre_square(height, width), remark=f"{path}: {error}; its centre is used as the face")
    box = np.median(track.boxes[track.seen], axis=0) * (max(height, width) / max(clip.size))
    return Square(*portrait_square(box, height, width), first=int(track.seen.argmax()))


def find_square_of_picture(path: str | Path, crop: str = "face", face_box: str | None = None) -> Square:
    """Find the square around the largest face of an image. See `find_square` for the arguments.

    Images with a rotated face are rotated. The remark states what was done, unless the whole image is used.
    """
    picture = read_picture(path)
    try:
        if face_box is not None:
            tracks = [place_face(ArrayFrames(picture), read_boxes(face_box), float(FPS))]
            turn = 0
        elif crop == "centre":
            return Square(*centre_square(*picture.shape[1:3]))
        else:
            with stage(f"{Path(path).name}: finding the face"):
                tracks, turn = find_upright_faces(picture)
    except FaceError as error:
        if face_box is not None:
            raise UserError(f"{path}: {error}") from error
        middle = centre_square(*picture.shape[1:3])
        return Square(*middle, remark=f"{path}: {error}; its centre is used as the face")
    height, width = turned(picture, turn).shape[1:3]
    left, top, side = portrait_square(tracks[0].boxes[0], height, width)
    done = []
    if turn:
        done.append(f"turned by {TURNS[turn]}")
    if len(tracks) > 1:
        done.append(f"the largest of {len(tracks)} faces is used")
    if side < max(height, width):
        done.append(f"the face is cut out as a square of {side} pixels")
    return Square(left, top, side, remark=f"{path}: {', '.join(done)}" if done else "", turn=turn)


def find_upright_faces(picture: np.ndarray) -> tuple[list[FaceTrack], int]:
    """Find the faces of an image (1, H, W, 3), largest first, and the rotation in degrees that makes them upright.

    Raises:
        FaceError: If no face is found.
    """
    try:
        return find_faces(ArrayFrames(picture), float(FPS), "all"), 0
    except FaceError as error:
        if not error.turn:
            raise
        return find_faces(ArrayFrames(turned(picture, error.turn)), float(FPS), "all"), error.turn


def read_square(path: str | Path, square: Square, count: int, start: int = 0) -> Iterator[np.ndarray]:
    """Read the square crop of `count` frames of a video, starting at frame `start`, or of an image: blocks (n, S, S, 3)
    uint8.

    There are fewer frames if the video is shorter.
    """
    if is_picture(path):
        yield square.crop(read_picture(path))
        return
    position = 0
    for block in watched(iter_video(path, float(FPS), block=min(start + count, 64))):
        part = block[max(0, start - position) : max(0, start + count - position)]
        if len(part):
            yield square.crop(part)
        position += len(block)
        if position >= start + count:
            break


def read_picture(path: str | Path) -> np.ndarray:
    """Read an image file as (1, H, W, 3) uint8 RGB."""
    try:
        pixels = math.prod(picture_size(check_readable(path)))
    except ValueError as error:
        raise UserError(f"{path} cannot be read as an image ({error})") from error
    if pixels > LIMITS.picture_pixels:
        raise UserError(f"{path} has more than {LIMITS.picture_pixels:,} pixels (limits.picture_pixels): scale it down")
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise UserError(f"{path} cannot be read as an image")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)[None]


@dataclass(frozen=True)
class Surroundings:
    """The still image around a talking face.

    Attributes:
        picture: (H, W, 3) uint8.
        left, top, side: position of the face square in pixels.
    """

    picture: np.ndarray
    left: int
    top: int
    side: int

    @cached_property
    def weight(self) -> np.ndarray:
        """Blending weight (S, S, 1) of the face: 1 inside, falling to 0 at borders that lie within the image."""
        height, width = self.picture.shape[:2]
        across = _fade(self.side, self.left > 0, self.left + self.side < width)
        down = _fade(self.side, self.top > 0, self.top + self.side < height)
        return np.minimum(down[:, None], across[None])[..., None]

    def paste(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the image (H, W, 3) with each frame (s, s, 3) resized and pasted into the square."""
        rows = slice(self.top, self.top + self.side)
        columns = slice(self.left, self.left + self.side)
        behind = self.picture[rows, columns].astype(np.float32)
        for frame in frames:
            face = cv2.resize(frame, (self.side, self.side), interpolation=cv2.INTER_CUBIC)
            whole = self.picture.copy()
            whole[rows, columns] = np.rint(behind + self.weight * (face - behind))
            yield whole


def _fade(side: int, at_start: bool, at_end: bool) -> np.ndarray:
    """Return weights (S,) that rise from 0 at the start and fall to 0 at the end, if requested."""
    position = (np.arange(side) + 0.5) / (FADE * side)
    rising = np.clip(position, 0, 1) if at_start else np.ones(side)
    falling = np.clip(position[::-1], 0, 1) if at_end else np.ones(side)
    weight = np.minimum(rising, falling)
    return (weight**2 * (3 - 2 * weight)).astype(np.float32)


def read_surroundings(path: str | Path, square: Square) -> Surroundings | None:
    """Read the image, or the video frame, from which a square was cropped. Return None if the square is the whole
    image.
    """
    whole = replace(square, left=0, top=0, side=WHOLE)
    picture = next(read_square(path, whole, 1, square.first))[0]
    if picture.shape[0] == picture.shape[1] == square.side:
        return None
    scale = min(1.0, LONGEST / max(picture.shape[:2]))
    if scale < 1:
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    height, width = picture.shape[:2]
    side = min(round(square.side * scale), height, width)
    left = min(round(square.left * scale), width - side)
    top = min(round(square.top * scale), height - side)
    return Surroundings(picture, left, top, side)
