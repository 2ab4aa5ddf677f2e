"""Face tracking through a clip.

Axes: T frames, H height, W width, n detections, P landmarks. Boxes are (x, y, w, h), points (x, y), in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.faces.detectors import BOX, POINTS, FaceDetector, box_of_points, five_points, middle_of, with_points
from engine.untrusted import read_json

DETECT_EVERY = 5  # frames between detections: 0.2 s at 25 fps, far below the time in which a head moves away
MAX_GAP = 1.0  # maximum gap without a detection that is interpolated, in seconds
MIN_COVERAGE = 0.3  # minimum fraction of a clip that shows the face
SMOOTH_SECONDS = 0.5
ADVICE = "use a clip with a frontal, well-lit face"


FACES = ("largest", "central", "left", "right", "speaking", "all")
MOST_FACES = 9  # maximum number of tracked faces in a clip
Face = str | int | tuple[float, float]  # choices of the tracked face, see `follow_faces`


class FaceError(UserError):
    """The face in a clip cannot be tracked. The message omits the clip's name.

    Attributes:
        turn: rotation in degrees anticlockwise after which the face is upright; 0 if none is known.
    """

    def __init__(self, message: str, turn: int = 0) -> None:
        super().__init__(message)
        self.turn = turn


@dataclass(frozen=True)
class FaceTrack:
    """Track of a face through a clip: boxes (T, 4), points (T, 5, 2), and `seen` (T,), False where the face is not
    visible.

    Boxes and points are smoothed over time. `landmarks` (T, P, 2) with P = 68 or 5 are not smoothed, or None. Frames
    without a visible face have the position of the nearest frame with one.
    """

    boxes: np.ndarray
    points: np.ndarray
    seen: np.ndarray
    landmarks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, frames: Any) -> FaceTrack:
        """Return the track restricted to some frames: a slice or indices."""
        landmarks = None if self.landmarks is None else self.landmarks[frames]
        return FaceTrack(self.boxes[frames], self.points[frames], self.seen[frames], landmarks)

    def scaled(self, factor: float) -> FaceTrack:
        """Return the track for frames scaled by `factor`."""
        landmarks = None if self.landmarks is None else self.landmarks * factor
        return FaceTrack(self.boxes * factor, self.points * factor, self.seen, landmarks)

    @property
    def best_points(self) -> np.ndarray:
        """Landmarks (T, P, 2) if available, else the five points."""
        return self.points if self.landmarks is None else self.landmarks

    @property
    def roll(self) -> np.ndarray:
        """Roll angle of the head (T,) in radians: the direction from the left to the right eye in the image."""
        across = self.points[:, 1] - self.points[:, 0]
        return np.arctan2(across[:, 1], across[:, 0]).round(6)

    @property
    def coverage(self) -> float:
        """Fraction of the frames in which the face was seen."""
        return float(self.seen.mean())

    def unseen(self, fps: float) -> str:
        """Return the intervals without a visible face, such as "2.0-3.4 s, 7.1-8.0 s", or ""."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], ~self.seen, [0]]).astype(int)))
        return ", ".join(f"{a / fps:.1f}-{b / fps:.1f} s" for a, b in edges.reshape(-1, 2))


# Yields the landmarks (P, 2) of a tracked face in each frame of a clip, or None. The clip is a re-iterable over blocks
# (n, H, W, 3).
LandmarkFinder = Callable[[Iterable[np.ndarray], FaceTrack], Iterator[np.ndarray | None]]


def read_face(face: str | int) -> str | int:
    """Parse the setting `face`, which may be a number given as text."""
    if isinstance(face, str) and face.isdecimal() and len(face) < 9:
        face = int(face)
    is_number = isinstance(face, int) and face >= 1
    if not (face in FACES or is_number):
        raise UserError(f"face={str(face)[:40]} is unknown: choose {', '.join(FACES)}, or a number from 1")
    return face


def track_faces(
    blocks: Iterable[np.ndarray], detector: FaceDetector, fps: float = 25.0, face: Face = "largest"
) -> list[FaceTrack]:
    """Detect faces in every `DETECT_EVERY`-th frame of a clip and track them; see `follow_faces`.

    Args:
        blocks: the frames, in blocks (n, H, W, 3).
    """
    if not isinstance(face, tuple):
        face = read_face(face)
    detections: list[tuple[int, np.ndarray]] = []
    frames = 0
    width_height = (1, 1)
    for block in blocks:
        for i in range(-frames % DETECT_EVERY, len(block), DETECT_EVERY):
            detections.append((frames + i, with_points(detector(block[i]))))
        frames += len(block)
        width_height = block.shape[2:0:-1]
    return follow_faces(detections, frames, width_height, fps, face)


def follow_faces(
    detections: list[tuple[int, np.ndarray]], frames: int, size: tuple[int, int], fps: float, face: Face = "largest"
) -> list[FaceTrack]:
    """Track one face, or several, through a clip of `frames` frames of width and height `size`.

    Detections that are close in time and position are linked to tracklets. Consecutive tracklets of the same person,
    for example after a cut or an occlusion, form a track. Local linear regression over time yields the face of every
    frame, which smooths jitter but follows head motion. Gaps of up to `MAX_GAP` seconds are interpolated.

    Args:
        detections: frame number and the faces (n, 14) detected in it, in order of time.
        face: "largest", "central", "left" or "right" of several faces, its number by size, counted from 1, or the
            position (x, y) to which it is nearest, in fractions of width and height; "all" or "speaking": all faces
            that are visible in enough of the clip, by size.

    Raises:
        FaceError: If there is no such face, or it is visible in too few frames.
    """
    position = (0.5, 0.5) if face == "central" else face if isinstance(face, tuple) else None
    target = None if position is None else np.array(size) * position
    people = _group_by_person(_link(detections, fps), target, max(size) / 2)
    if not people:
        where = "the image" if frames == 1 else f"any of its {frames / fps:.1f} s"
        raise FaceError(f"no face found in {where}: {ADVICE}")
    if face == "largest" or position is not None:
        return [_check_coverage(_smooth(people[0], frames, fps), fps)]

    people = _distinct(people, frames) or people[:1]
    if face in ("left", "right"):
        people.sort(key=lambda person: np.median(_centres(person)[:, 0]), reverse=face == "right")
    if face in ("all", "speaking"):
        chosen = people[:MOST_FACES]
    else:
        number = face if isinstance(face, int) else 1
        if number > len(people):
            raise FaceError(f"face={face}: only {len(people)} were found, choose a lower number")
        chosen = [people[number - 1]]
    return [_check_coverage(_smooth(person, frames, fps), fps) for person in chosen]


def _check_coverage(track: FaceTrack, fps: float) -> FaceTrack:
    """Return `track`, or raise FaceError if the face is visible in too few frames."""
    if track.coverage < MIN_COVERAGE:
        raise FaceError(
            f"no face found in {1 - track.coverage:.0%} of the clip (at {track.unseen(fps)}), "
            f"at most {1 - MIN_COVERAGE:.0%} are allowed: {ADVICE}"
        )
    return track


@dataclass(frozen=True)
class _Tracklet:
    """Detections (n, 14) of one face with no long gap, and the numbers (n,) of their frames."""

    index: np.ndarray
    faces: np.ndarray

    @property
    def first(self) -> int:
        return self.index[0]

    @property
    def last(self) -> int:
        return self.index[-1]


_Person = list[_Tracklet]  # tracklets of one person in chronological order


def _link(detections: list[tuple[int, np.ndarray]], fps: float) -> list[_Tracklet]:
    """Link the faces (n, 14) of frames in chronological order to tracklets.

    If there are longer tracklets, those of one or two detections are discarded as false positives.
    """
    open_tracklets: list[list[tuple[int, np.ndarray]]] = []
    closed = []
    for frame, faces in detections:
        closed += [each for each in open_tracklets if frame - each[-1][0] > MAX_GAP * fps]
        open_tracklets = [each for each in open_tracklets if frame - each[-1][0] <= MAX_GAP * fps]
        pairs = []  # distance, tracklet, face
        for i, tracklet in enumerate(open_tracklets):
            before, last = tracklet[-1]
            for j, face in enumerate(faces):
                distance = face_distance(last, face, reach=0.4 + (frame - before) / fps)
                if distance < 1:
                    pairs.append((distance, i, j))
        assigned: dict[int, int] = {}  # maps each face to its tracklet
        for _, i, j in sorted(pairs):  # nearest pairs first
            if j not in assigned and i not in assigned.values():
                open_tracklets[i].append((frame, faces[j]))
                assigned[j] = i
        open_tracklets += [[(frame, face)] for j, face in enumerate(faces) if j not in assigned]
    tracklets = [
        _Tracklet(np.array([frame for frame, _ in each]), np.stack([face for _, face in each]))
        for each in closed + open_tracklets
    ]
    return [each for each in tracklets if len(each.index) >= 3] or tracklets


def face_distance(one: np.ndarray, other: np.ndarray, reach: float) -> float:
    """Return the distance in position and size of two faces (14,) or boxes (4,). A distance of 1 or more means
    different people.

    Args:
        reach: maximum head movement in face widths.
    """
    moved = np.abs(middle_of(other) - middle_of(one)).max() / max(one[2], other[2])
    grown = abs(np.log(other[2] / one[2]))
    return max(moved / reach, grown / 0.4)


def _group_by_person(tracklets: list[_Tracklet], target: np.ndarray | None, unit: float) -> list[_Person]:
    """Group tracklets by person, most prominent first. Tracklets that overlap in time belong to different people.

    Prominence is the size of the face or, given a `target` position (2,) in pixels, the proximity to it in units of
    `unit` pixels.
    """

    def prominence(chain: _Person) -> float:
        if target is None:
            return float(sum((tracklet.faces[:, 2] ** 2).sum() for tracklet in chain))
        offset = np.linalg.norm(_centres(chain) - target, axis=1) / unit
        return float(np.exp(-4 * offset).sum())

    chains = sorted(_join(tracklets), key=prominence, reverse=True)
    people = []
    while chains:
        person: _Person = []
        others = []
        for chain in chains:
            if any(_overlap(a, b) for a in chain for b in person):
                others.append(chain)
            else:
                person.extend(chain)
        people.append(sorted(person, key=lambda tracklet: tracklet.first))
        chains = others
    return people


def _overlap(one: _Tracklet, other: _Tracklet) -> bool:
    """Return whether two tracklets overlap in time."""
    return not (one.last < other.first or other.last < one.first)


def _join(tracklets: list[_Tracklet]) -> list[_Person]:
    """Join tracklets to chains. A face that reappears at the same position and size counts as the same person."""
    pairs = []  # distance, gap in frames, earlier tracklet, later tracklet
    for i, earlier in enumerate(tracklets):
        for j, later in enumerate(tracklets):
            if earlier.last < later.first:
                distance = face_distance(earlier.faces[-1], later.faces[0], reach=0.6)
                if distance < 1:
                    pairs.append((distance, later.first - earlier.last, i, j))
    following: dict[int, int] = {}
    for _, _, i, j in sorted(pairs):  # the most likely pairs first
        if i not in following and j not in following.values():
            following[i] = j
    chains = []
    for i in range(len(tracklets)):
        if i in following.values():
            continue
        chain = [i]
        while chain[-1] in following:
            chain.append(following[chain[-1]])
        chains.append([tracklets[k] for k in chain])
    return chains


def _distinct(people: list[_Person], frames: int) -> list[_Person]:
    """Return people who are visible in enough frames, without duplicate detections of a face at two sizes."""
    distinct: list[_Person] = []
    for person in people:
        _, seen = _nearest_tracklet(person, frames)
        if seen.mean() >= MIN_COVERAGE and not any(_is_inside(person, other) for other in distinct):
            distinct.append(person)
    return distinct


def _is_inside(person: _Person, other: _Person) -> bool:
    """Return whether the face centre of `person` lies in the box of `other` in most frames."""
    index, faces = _detections(person)
    other_index, boxes = _detections(other)
    _, i, j = np.intersect1d(index, other_index, return_indices=True)
    offset = np.abs(middle_of(faces[i]) - middle_of(boxes[j]))
    inside = (offset < boxes[j, 2:4] / 2).all(1)
    return int(inside.sum()) > len(index) / 2


def _detections(person: _Person) -> tuple[np.ndarray, np.ndarray]:
    """Return the frame numbers (n,) and faces (n, 14) of all detections of a person."""
    index = np.concatenate([tracklet.index for tracklet in person])
    return index, np.concatenate([tracklet.faces for tracklet in person])


def _centres(person: _Person) -> np.ndarray:
    """Return the centres (n, 2) of all detections of a person."""
    return middle_of(_detections(person)[1])


def _smooth(person: _Person, frames: int, fps: float) -> FaceTrack:
    """Return the face in every frame, from the tracklet nearest in time. Each tracklet is smoothed separately."""
    nearest, seen = _nearest_tracklet(person, frames)
    faces = np.empty((frames, POINTS.stop))
    for i, tracklet in enumerate(person):
        own_frames = np.flatnonzero(nearest == i)
        times = np.clip(own_frames, tracklet.first - DETECT_EVERY, tracklet.last + DETECT_EVERY) / fps
        plausible = _plausible(tracklet, fps)
        faces[own_frames] = _local_lines(tracklet.index[plausible] / fps, tracklet.faces[plausible], times)
    return FaceTrack(faces[:, BOX], faces[:, POINTS].reshape(-1, 5, 2), seen)


def _nearest_tracklet(person: _Person, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each frame (T,) the tracklet nearest in time, and whether the face is visible."""
    time = np.arange(frames)
    starts = np.array([tracklet.first for tracklet in person])
    ends = np.array([tracklet.last for tracklet in person])
    away = np.maximum(np.maximum(starts[:, None] - time, time - ends[:, None]), 0)  # frames
    seen = away.min(0) <= DETECT_EVERY // 2
    if frames - max(ends) <= DETECT_EVERY:  # no detector ran on later frames
        seen[max(ends) :] = True
    return away.argmin(0), seen


def _plausible(tracklet: _Tracklet, fps: float) -> np.ndarray:
    """Return a mask (n,) of detections that agree with the median of those within one second."""
    faces = np.column_stack([middle_of(tracklet.faces), tracklet.faces[:, 2:4]])
    first = np.searchsorted(tracklet.index, tracklet.index - fps)
    last = np.searchsorted(tracklet.index, tracklet.index + fps, side="right")
    usual = []
    for a, b in zip(first, last):
        near = faces[a:b]
        # Use the median by width instead of a mean: if two faces were linked, one of them is tracked.
        usual.append(near[np.argsort(near[:, 2], kind="stable")[len(near) // 2]])
    usual = np.stack(usual)
    moved = np.abs(faces[:, :2] - usual[:, :2]).max(1) / usual[:, 2]
    grown = np.abs(np.log(faces[:, 2] / usual[:, 2]))
    plausible = (moved < 0.5) & (grown < 0.25)
    return plausible if plausible.any() else ~plausible


def _local_lines(seconds: np.ndarray, faces: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Fit locally weighted lines to faces (n, 14) at `seconds` (n,); return their values (m, 14) at `times` (m,).

    Widths are averaged locally without a trend, which would extrapolate.
    """
    values = faces.copy()
    values[:, :2] = middle_of(faces)  # fit centres, as corners also move when the size fluctuates
    out = np.empty((len(times), faces.shape[1]))
    far = 8 * SMOOTH_SECONDS  # with zero weight; gaps within a tracklet are shorter
    for i, time in enumerate(times):
        near = slice(*np.searchsorted(seconds, (time - far, time + far)))
        offset = seconds[near] - time
        weight = np.exp(-0.5 * (offset / SMOOTH_SECONDS) ** 2) + 1e-9
        mean_offset = np.average(offset, weights=weight)
        mean = np.average(values[near], axis=0, weights=weight)
        centred = offset - mean_offset
        spread = weight @ centred**2 + 0.1 * weight.sum() * SMOOTH_SECONDS**2  # the second term damps the slope
        slope = (weight * centred) @ (values[near] - mean) / spread
        slope[2:4] = 0
        out[i] = mean - slope * mean_offset
    out[:, :2] -= out[:, 2:4] / 2
    return out


def read_boxes(text: str) -> Any:
    """Parse the setting `face_box` for `track_of_boxes`: "x,y,w,h", or the path of a JSON file."""
    if text.endswith(".json"):
        return read_json(text, f"face_box={text}")
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"face_box={text}: expected x,y,w,h in pixels, or a .json file") from None


def track_of_boxes(boxes: Any, frames: int, fps: float = 25.0) -> FaceTrack:
    """Create a track from boxes given by the user.

    Args:
        boxes: one box [x, y, w, h] for the whole clip; or a list of boxes, one per frame; or a list of {"time":
            seconds, "box": [x, y, w, h]}, between which boxes are interpolated linearly. A box is in pixels and spans
            from the forehead to the chin.
        frames: number of frames of the clip.
        fps: frame rate, for the times of boxes.

    Raises:
        FaceError: If a list contains fewer boxes than the clip has frames.
        UserError: If `boxes` has another format, or a box is empty or not finite.
    """
    try:
        if isinstance(boxes[0], dict):
            keys = sorted(boxes, key=lambda key: key["time"])
            times = np.array([float(key["time"]) for key in keys])
            corners = np.array([key["box"] for key in keys], np.float64).reshape(-1, 4)
            values = np.stack([np.interp(np.arange(frames) / fps, times, c) for c in corners.T], 1)
        else:
            values = np.array(boxes, np.float64)
            values = np.tile(values, (frames, 1)) if values.shape == (4,) else values[:frames]
            values = values.reshape(-1, 4)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise UserError(
            f"face_box={str(boxes)[:80]}: expected x,y,w,h, or a JSON list of one box per frame or of "
            '{"time": seconds, "box": [x, y, w, h]}'
        ) from error
    if len(values) < frames:
        raise FaceError(f"face_box has boxes for {len(values)} frames, the clip has {frames} at {fps:g} per second")
    if not (np.isfinite(values).all() and (values[:, 2:] > 0).all()):
        raise UserError(f"face_box={str(boxes)[:80]}: widths and heights must be larger than 0")
    faces = with_points(values)
    return FaceTrack(faces[:, BOX], faces[:, POINTS].reshape(-1, 5, 2), np.ones(frames, bool))


def landmark_track(landmarks: np.ndarray, present: np.ndarray, fps: float) -> FaceTrack:
    """Create the track of a face from landmarks (T, P, 2), P = 68 or 5, which are valid where `present` (T,) is
    True.
    """
    points = five_points(landmarks)
    detections = [(i, np.array([[*box_of_points(points[i]), *points[i].ravel()]])) for i in np.flatnonzero(present)]
    track = _smooth(_link(detections, fps), len(points), fps)
    return _check_coverage(replace(track, seen=present, landmarks=landmarks), fps)


def add_landmarks(blocks: Iterable[np.ndarray], track: FaceTrack, finder: LandmarkFinder) -> FaceTrack:
    """Add landmarks to every frame of the track. Missing landmarks are interpolated over time."""
    return replace(track, landmarks=fill_landmarks(*stack_landmarks(list(finder(blocks, track)))))


def fill_landmarks(landmarks: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Interpolate landmarks (T, P, 2) in frames where `present` (T,) is false."""
    if not present.any():
        raise FaceError("no frame of the clip has landmarks: use another file, or omit face_landmarks")
    time = np.arange(len(landmarks))
    index = np.flatnonzero(present)
    flat = landmarks.reshape(len(landmarks), -1).astype(np.float64)
    filled = np.stack([np.interp(time, index, column[index]) for column in flat.T], 1)
    filled[index] = flat[index]
    return filled.reshape(landmarks.shape)


def stack_landmarks(frames: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Stack the landmarks (P, 2) or None of each frame to (T, P, 2), with zeros for None, and a mask (T,)."""
    present = np.array([points is not None for points in frames], bool)
    zeros = next((np.zeros_like(points, np.float64) for points in frames if points is not None), np.zeros((5, 2)))
    return np.stack([zeros if points is None else np.asarray(points, np.float64) for points in frames]), present
