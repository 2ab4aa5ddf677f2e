"""Following a face through a clip.

Axes: T frames, H height, W width, n detections, P landmarks. Boxes are (x, y, w, h), points (x, y), in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.faces.detectors import BOX, POINTS, FaceDetector, box_of_points, five_points, middle_of, with_points
from engine.untrusted import read_json

DETECT_EVERY = 5  # frames between detections: 0.2 s at 25 fps, far below the time in which a head moves away
MAX_GAP = 1.0  # seconds without a detection over which a face is taken to have been there
MIN_COVERAGE = 0.3  # fraction of a clip that must show the face
SMOOTH_SECONDS = 0.5
ADVICE = "give a clip with a frontal, lit face, or say where it is (face_box)"


FACES = ("largest", "central", "left", "right", "speaking", "all")
MOST_FACES = 9  # that are followed in a clip
Face = str | int | tuple[float, float]  # which of several faces is followed; see `follow_faces`


class FaceError(UserError):
    """A face that cannot be followed through a clip; the message leaves the clip's name out.

    Attributes:
        turn: degrees anticlockwise by which the picture must be turned so that its face stands upright; 0: it is not
            known that turning would help.
    """

    def __init__(self, message: str, turn: int = 0) -> None:
        super().__init__(message)
        self.turn = turn


@dataclass(frozen=True)
class FaceTrack:
    """One face through a clip: boxes (T, 4), points (T, 5, 2), and `seen` (T,), false where it was out of sight.

    Boxes and points are smooth in time; `landmarks` (T, P, 2), 68 or 5, are not smoothed, None if there are none.
    Frames out of sight have the position at which the face was seen nearest in time.
    """

    boxes: np.ndarray
    points: np.ndarray
    seen: np.ndarray
    landmarks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, frames: Any) -> FaceTrack:
        """Return the track of some frames: a slice, or indices."""
        landmarks = None if self.landmarks is None else self.landmarks[frames]
        return FaceTrack(self.boxes[frames], self.points[frames], self.seen[frames], landmarks)

    def scaled(self, factor: float) -> FaceTrack:
        """Return the track in pictures of `factor` times the size."""
        landmarks = None if self.landmarks is None else self.landmarks * factor
        return FaceTrack(self.boxes * factor, self.points * factor, self.seen, landmarks)

    @property
    def best_points(self) -> np.ndarray:
        """Landmarks (T, P, 2), or else the five points."""
        return self.points if self.landmarks is None else self.landmarks

    @property
    def roll(self) -> np.ndarray:
        """Tilt of each head (T,) in radians: the direction from the eye on the left to that on the right."""
        across = self.points[:, 1] - self.points[:, 0]
        return np.arctan2(across[:, 1], across[:, 0]).round(6)

    @property
    def coverage(self) -> float:
        """Fraction of the frames in which the face was seen."""
        return float(self.seen.mean())

    def unseen(self, fps: float) -> str:
        """Return the stretches out of sight, as "2.0-3.4 s, 7.1-8.0 s"; empty if there are none."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], ~self.seen, [0]]).astype(int)))
        return ", ".join(f"{a / fps:.1f}-{b / fps:.1f} s" for a, b in edges.reshape(-1, 2))


def read_face(face: str | int) -> str | int:
    """Return the setting `face`, which may be the text of a number."""
    if isinstance(face, str) and face.isdecimal() and len(face) < 9:
        face = int(face)
    is_number = isinstance(face, int) and face >= 1
    if not (face in FACES or is_number):
        raise UserError(f"face={str(face)[:40]} is unknown: give {', '.join(FACES)}, or a number from 1 on")
    return face


def track_faces(
    blocks: Iterable[np.ndarray], detector: FaceDetector, fps: float = 25.0, face: Face = "largest"
) -> list[FaceTrack]:
    """Detect faces in every `DETECT_EVERY`-th frame of a clip and follow them; see `follow_faces`.

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
    """Follow one face, or several, through a clip of `frames` pictures of width and height `size`.

    Detections that lie near each other in time and position are linked to tracklets. Tracklets that one person could
    have made (one after the other: after a cut, or back in view) form a track. A line fitted to each neighbourhood
    gives the face of every frame: it follows a moving head, not the jitter. Gaps of up to `MAX_GAP` seconds are
    interpolated.

    Args:
        detections: frame number and the faces (n, 14) detected in it, in order of time.
        face: "largest", "central", "left" or "right" of several faces, its number by size, counted from 1, or the
            position (x, y) to which it is nearest, in fractions of width and height; "all" or "speaking": all faces
            that enough of the clip shows, by size.

    Raises:
        FaceError: there is no such face, or too little of the clip shows it.
    """
    position = (0.5, 0.5) if face == "central" else face if isinstance(face, tuple) else None
    target = None if position is None else np.array(size) * position
    people = _group_by_person(_link(detections, fps), target, max(size) / 2)
    if not people:
        raise FaceError(f"no face found in any of its {frames / fps:.1f} s: {ADVICE}")
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
            raise FaceError(f"face={face}: only {len(people)} can be distinguished, give a number up to that")
        chosen = [people[number - 1]]
    return [_check_coverage(_smooth(person, frames, fps), fps) for person in chosen]


def _check_coverage(track: FaceTrack, fps: float) -> FaceTrack:
    """Return `track`, unless too few of its frames show the face."""
    if track.coverage < MIN_COVERAGE:
        raise FaceError(
            f"no face found in {1 - track.coverage:.0%} of it (at {track.unseen(fps)}), at most "
            f"{1 - MIN_COVERAGE:.0%} may lack one: {ADVICE}"
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


_Person = list[_Tracklet]  # tracklets of one person, in order of time


def _link(detections: list[tuple[int, np.ndarray]], fps: float) -> list[_Tracklet]:
    """Link the faces (n, 14) of frames, in order of time, to tracklets.

    Tracklets of one or two detections beside longer ones are mistakes of the detector, and are left out.
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
        assigned: dict[int, int] = {}  # by face, its tracklet
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
    """Return the distance of two faces (14,) or boxes (4,) in position and size; 1 or more: different people.

    Args:
        reach: face widths that the head may have moved.
    """
    moved = np.abs(middle_of(other) - middle_of(one)).max() / max(one[2], other[2])
    grown = abs(np.log(other[2] / one[2]))
    return max(moved / reach, grown / 0.4)


def _group_by_person(tracklets: list[_Tracklet], target: np.ndarray | None, unit: float) -> list[_Person]:
    """Group tracklets by person, the most prominent person first; tracklets that overlap in time are of different ones.

    Prominent is who is large, or, if there is a `target` position (2,) in pixels, who is near it, in units of `unit`
    pixels.
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
    """Join tracklets to chains: a face that comes back at the same position and size is the same person's."""
    pairs = []  # distance, gap in frames, earlier tracklet, later tracklet
    for i, earlier in enumerate(tracklets):
        for j, later in enumerate(tracklets):
            if earlier.last < later.first:
                distance = face_distance(earlier.faces[-1], later.faces[0], reach=0.6)
                if distance < 1:
                    pairs.append((distance, later.first - earlier.last, i, j))
    following: dict[int, int] = {}
    for _, _, i, j in sorted(pairs):  # the likeliest pairs first
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
    """Return the people that enough of the clip shows, without faces that were detected in two sizes."""
    distinct: list[_Person] = []
    for person in people:
        _, seen = _nearest_tracklet(person, frames)
        if seen.mean() >= MIN_COVERAGE and not any(_is_inside(person, other) for other in distinct):
            distinct.append(person)
    return distinct


def _is_inside(person: _Person, other: _Person) -> bool:
    """Return whether the middle of the face of `person` lies in the box of `other` in most of its frames."""
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
    """Return the middles (n, 2) of all detections of a person."""
    return middle_of(_detections(person)[1])


def _smooth(person: _Person, frames: int, fps: float) -> FaceTrack:
    """Return the face of every frame, each from the tracklet nearest in time; tracklets are smoothed one by one."""
    nearest, seen = _nearest_tracklet(person, frames)
    faces = np.empty((frames, POINTS.stop))
    for i, tracklet in enumerate(person):
        own_frames = np.flatnonzero(nearest == i)
        times = np.clip(own_frames, tracklet.first - DETECT_EVERY, tracklet.last + DETECT_EVERY) / fps
        plausible = _plausible(tracklet, fps)
        faces[own_frames] = _local_lines(tracklet.index[plausible] / fps, tracklet.faces[plausible], times)
    return FaceTrack(faces[:, BOX], faces[:, POINTS].reshape(-1, 5, 2), seen)


def _nearest_tracklet(person: _Person, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each frame (T,) the tracklet that is nearest in time, and whether the face is seen in it."""
    time = np.arange(frames)
    starts = np.array([tracklet.first for tracklet in person])
    ends = np.array([tracklet.last for tracklet in person])
    away = np.maximum(np.maximum(starts[:, None] - time, time - ends[:, None]), 0)  # frames
    seen = away.min(0) <= DETECT_EVERY // 2
    if frames - max(ends) <= DETECT_EVERY:  # no later frame was searched
        seen[max(ends) :] = True
    return away.argmin(0), seen


def _plausible(tracklet: _Tracklet, fps: float) -> np.ndarray:
    """Return which detections (n,) lie where those of one second to either side usually do."""
    faces = np.column_stack([middle_of(tracklet.faces), tracklet.faces[:, 2:4]])
    first = np.searchsorted(tracklet.index, tracklet.index - fps)
    last = np.searchsorted(tracklet.index, tracklet.index + fps, side="right")
    usual = []
    for a, b in zip(first, last):
        near = faces[a:b]
        # The middle one by width, not a mean: where two faces were taken for one, one of them is followed.
        usual.append(near[np.argsort(near[:, 2], kind="stable")[len(near) // 2]])
    usual = np.stack(usual)
    moved = np.abs(faces[:, :2] - usual[:, :2]).max(1) / usual[:, 2]
    grown = np.abs(np.log(faces[:, 2] / usual[:, 2]))
    plausible = (moved < 0.5) & (grown < 0.25)
    return plausible if plausible.any() else ~plausible


def _local_lines(seconds: np.ndarray, faces: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Fit locally weighted lines to faces (n, 14) at `seconds` (n,); return their values (m, 14) at `times` (m,).

    Widths get only a local mean: a head does not grow while it is out of sight.
    """
    values = faces.copy()
    values[:, :2] = middle_of(faces)  # centres move; corners also shift as sizes flicker
    out = np.empty((len(times), faces.shape[1]))
    far = 8 * SMOOTH_SECONDS  # whose weight is nothing; a tracklet has no gap as long
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
    """Read the boxes that `face_box=` names, for `track_of_boxes`: "x,y,w,h", or the path of a JSON file."""
    if text.endswith(".json"):
        return read_json(text, f"face_box={text}")
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"face_box={text}: give x,y,w,h in pixels, or a .json file") from None


def track_of_boxes(boxes: Any, frames: int, fps: float = 25.0) -> FaceTrack:
    """Create a track from boxes that the user gives instead of a detector's.

    Args:
        boxes: one box [x, y, w, h] for the whole clip; or a list of boxes, one per frame; or a list of
            {"time": seconds, "box": [x, y, w, h]}, between which boxes move in a line. A box reaches from the forehead
            to the chin.
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
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"face_box={str(boxes)[:80]}: give x,y,w,h, or a JSON list of one box per frame or of "
            '{"time": seconds, "box": [x, y, w, h]}'
        ) from error
    if len(values) < frames:
        raise FaceError(f"face_box has boxes for {len(values)} frames, the clip has {frames} at {fps:g} a second")
    if not (np.isfinite(values).all() and (values[:, 2:] > 0).all()):
        raise UserError(f"face_box={str(boxes)[:80]}: widths and heights must be larger than 0")
    faces = with_points(values)
    return FaceTrack(faces[:, BOX], faces[:, POINTS].reshape(-1, 5, 2), np.ones(frames, bool))


def landmark_track(landmarks: np.ndarray, present: np.ndarray, fps: float) -> FaceTrack:
    """Create the track of a face whose landmarks (T, P, 2), 68 or 5, are known where `present` (T,)."""
    points = five_points(landmarks)
    detections = [(i, np.array([[*box_of_points(points[i]), *points[i].ravel()]])) for i in np.flatnonzero(present)]
    track = _smooth(_link(detections, fps), len(points), fps)
    return _check_coverage(replace(track, seen=present, landmarks=landmarks), fps)
