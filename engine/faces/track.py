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
MIN_COVERAGE = 0.3  # share of a clip that must show the face
SMOOTH_SECONDS = 0.5
ADVICE = "give a clip with a frontal, lit face, or say where it is (face_box)"


FACES = ("largest", "central", "left", "right", "speaking", "all")
MOST_FACES = 9  # that are followed in a clip
Face = str | int | tuple[float, float]  # which of several faces is followed; see `follow_faces`


class FaceError(UserError):
    """A face that cannot be followed through a clip; the message leaves the clip's name out."""


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
        """Share of the frames in which the face was seen."""
        return float(self.seen.mean())

    def unseen(self, fps: float) -> str:
        """Return the stretches out of sight, as "2.0-3.4 s, 7.1-8.0 s"; empty if there are none."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], ~self.seen, [0]]).astype(int)))
        return ", ".join(f"{a / fps:.1f}-{b / fps:.1f} s" for a, b in edges.reshape(-1, 2))


def read_face(face: str | int) -> str | int:
    """Return the setting `face`, which may be the text of a number."""
    if isinstance(face, str) and face.isdecimal() and len(face) < 9:
        face = int(face)
    if not (face in FACES or (isinstance(face, int) and face >= 1)):
        raise UserError(f"face={str(face)[:40]} is unknown: give {', '.join(FACES)}, or a number from 1 on")
    return face


def track_faces(
    blocks: Iterable[np.ndarray], detector: FaceDetector, fps: float = 25.0, face: Face = "largest"
) -> list[FaceTrack]:
    """Detect faces in every `DETECT_EVERY`-th frame of blocks (n, H, W, 3) of a clip, and follow them."""
    if not isinstance(face, tuple):
        face = read_face(face)
    faces, frames, size = [], 0, (1, 1)
    for block in blocks:
        for i in range(-frames % DETECT_EVERY, len(block), DETECT_EVERY):
            faces.append((frames + i, with_points(detector(block[i]))))
        frames, size = frames + len(block), block.shape[2:0:-1]
    return follow_faces(faces, frames, size, fps, face)


def follow_faces(
    faces: list[tuple[int, np.ndarray]], frames: int, size: tuple[int, int], fps: float, face: Face = "largest"
) -> list[FaceTrack]:
    """Follow one face, or several, through a clip of `frames` pictures of width and height `size`.

    Detections that lie near each other in time and position are linked to stretches. Those that one person could have
    made (one after the other: after a cut, or back in view) form a track. A line fitted to each neighbourhood gives the
    face of every frame: it follows a moving head, and not the jitter. Gaps of up to `MAX_GAP` seconds are interpolated.

    Args:
        faces: number of a frame, and the faces (n, 14) that were detected in it, in order of time.
        face: "largest", "central", "left" or "right" of several faces, its number by size, counted from 1, or the
            position (x, y) to which it is nearest, in fractions of width and height; "all" or "speaking": all faces
            that enough of the clip shows, by size.
    """
    centre = (0.5, 0.5) if face == "central" else face if isinstance(face, tuple) else None
    people = _people(_link(faces, fps), None if centre is None else np.array(size) * centre, max(size) / 2)
    if not people:
        raise FaceError(f"no face found in any of its {frames / fps:.1f} s: {ADVICE}")
    if face in ("largest", "central") or isinstance(face, tuple):
        return [_check_coverage(_smooth(people[0], frames, fps), fps)]
    distinct: list[list[_Stretch]] = []
    for person in people:  # less prominent ones in the box of another are faces that were detected in two sizes
        if _shown(person, frames)[1].mean() >= MIN_COVERAGE and not any(_nested(person, other) for other in distinct):
            distinct.append(person)
    people = distinct or people[:1]
    if face in ("left", "right"):
        people.sort(key=lambda person: np.median(_centres(person)[:, 0]), reverse=face == "right")
    number = face if isinstance(face, int) else 1
    if number > len(people):
        raise FaceError(f"face={face}: only {len(people)} can be distinguished, give a number up to that")
    several = people[:MOST_FACES] if face in ("all", "speaking") else people[number - 1 : number]
    return [_check_coverage(_smooth(person, frames, fps), fps) for person in several]


def _nested(person: list[_Stretch], other: list[_Stretch]) -> bool:
    """Return whether the middle of `person` lies in the box of `other` in most frames."""
    (own, faces), (others, boxes) = (
        (np.concatenate([s.index for s in each]), np.concatenate([s.faces for s in each])) for each in (person, other)
    )
    _, i, j = np.intersect1d(own, others, return_indices=True)
    apart = np.abs(middle_of(faces[i]) - middle_of(boxes[j]))
    return int((apart < boxes[j, 2:4] / 2).all(1).sum()) > len(own) / 2


def _check_coverage(track: FaceTrack, fps: float) -> FaceTrack:
    """Return `track`, unless too few of its frames show the face."""
    if track.coverage < MIN_COVERAGE:
        raise FaceError(
            f"no face found in {1 - track.coverage:.0%} of it (at {track.unseen(fps)}), at most "
            f"{1 - MIN_COVERAGE:.0%} may lack one: {ADVICE}"
        )
    return track


@dataclass(frozen=True)
class _Stretch:
    """Detections (n, 14) of one face, with no long gap, and the numbers (n,) of their frames."""

    index: np.ndarray
    faces: np.ndarray


def _link(detections: list[tuple[int, np.ndarray]], fps: float) -> list[_Stretch]:
    """Link faces (n, 14) of frames in order of time to stretches; one or two detections beside longer ones are
    mistakes.
    """
    open_, closed = [], []
    for frame, faces in detections:
        closed += [s for s in open_ if frame - s[-1][0] > MAX_GAP * fps]
        open_ = [s for s in open_ if frame - s[-1][0] <= MAX_GAP * fps]
        costs = sorted(
            (cost, i, j)
            for i, (*_, (before, last)) in enumerate(open_)
            for j, face in enumerate(faces)
            if (cost := change(last, face, reach=0.4 + (frame - before) / fps)) < 1
        )
        pairs: dict[int, int] = {}  # face -> stretch
        for _, i, j in costs:  # nearest pairs first
            if j not in pairs and i not in pairs.values():
                open_[i].append((frame, faces[j]))
                pairs[j] = i
        open_ += [[(frame, face)] for j, face in enumerate(faces) if j not in pairs]
    stretches = [_Stretch(np.array([i for i, _ in s]), np.stack([face for _, face in s])) for s in closed + open_]
    return [s for s in stretches if len(s.index) >= 3] or stretches


def change(one: np.ndarray, other: np.ndarray, reach: float) -> float:
    """Return the distance of two faces (14,) or boxes (4,); 1 or more: different people.

    reach: face widths that the head may have moved.
    """
    moved = np.abs(middle_of(other) - middle_of(one)).max() / max(one[2], other[2])
    return max(moved / reach, abs(np.log(other[2] / one[2])) / 0.4)


def _people(stretches: list[_Stretch], centre: np.ndarray | None, unit: float) -> list[list[_Stretch]]:
    """Group stretches by person, the most prominent person first: stretches that overlap in time belong to several.

    Prominent is who is large, or near the position `centre` in pixels, in units of half the longer side (`unit`).
    """

    def weight(chain: list[_Stretch]) -> float:
        if centre is None:
            return float(sum((s.faces[:, 2] ** 2).sum() for s in chain))
        offset = np.linalg.norm(_centres(chain) - centre, axis=1) / unit
        return float(np.exp(-4 * offset).sum())

    chains, people = sorted(_chains(stretches), key=weight, reverse=True), []
    while chains:
        person, others = [], []
        for chain in chains:
            apart = all(a.index[-1] < b.index[0] or b.index[-1] < a.index[0] for a in chain for b in person)
            (person if apart else others).extend(chain if apart else [chain])
        chains = others
        people.append(sorted(person, key=lambda s: s.index[0]))
    return people


def _centres(person: list[_Stretch]) -> np.ndarray:
    """Return the middles (n, 2) of all detections of a person."""
    return middle_of(np.concatenate([s.faces for s in person]))


def _chains(stretches: list[_Stretch]) -> list[list[_Stretch]]:
    """Join stretches to chains: a face that comes back at the same position and size is the same person's."""
    costs = sorted(
        (cost, b.index[0] - a.index[-1], i, j)
        for i, a in enumerate(stretches)
        for j, b in enumerate(stretches)
        if a.index[-1] < b.index[0] and (cost := change(a.faces[-1], b.faces[0], reach=0.6)) < 1
    )
    after: dict[int, int] = {}
    for _, _, i, j in costs:  # the likeliest pairs first
        if i not in after and j not in after.values():
            after[i] = j
    chains = []
    for i in range(len(stretches)):
        if i not in after.values():
            chain = [i]
            while chain[-1] in after:
                chain.append(after[chain[-1]])
            chains.append([stretches[k] for k in chain])
    return chains


def _smooth(person: list[_Stretch], frames: int, fps: float) -> FaceTrack:
    """Return the face of every frame, each from the stretch nearest in time; stretches are smoothed one by one."""
    nearest, seen = _shown(person, frames)
    values = np.empty((frames, POINTS.stop))
    for i, stretch in enumerate(person):
        mine = np.flatnonzero(nearest == i)
        times = np.clip(mine, stretch.index[0] - DETECT_EVERY, stretch.index[-1] + DETECT_EVERY) / fps
        plausible = _plausible(stretch, fps)
        values[mine] = _local_lines(stretch.index[plausible] / fps, stretch.faces[plausible], times)
    return FaceTrack(values[:, BOX], values[:, POINTS].reshape(-1, 5, 2), seen)


def _shown(person: list[_Stretch], frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each frame (T,) the stretch that is nearest in time, and whether the face is seen in it."""
    time = np.arange(frames)
    starts, ends = (np.array([s.index[i] for s in person]) for i in (0, -1))
    away = np.maximum(np.maximum(starts[:, None] - time, time - ends[:, None]), 0)
    seen = away.min(0) <= DETECT_EVERY // 2
    seen[max(ends) :] |= frames - max(ends) <= DETECT_EVERY  # no later frame was searched
    return away.argmin(0), seen


def _plausible(stretch: _Stretch, fps: float) -> np.ndarray:
    """Return which detections (n,) lie where those of one second to either side usually do."""
    faces = np.column_stack([middle_of(stretch.faces), stretch.faces[:, 2:4]])
    first = np.searchsorted(stretch.index, stretch.index - fps)
    last = np.searchsorted(stretch.index, stretch.index + fps, side="right")
    near = [faces[a:b] for a, b in zip(first, last)]
    # The middle one by width, not a mean: where two faces were taken for one, one of them is followed.
    middle = np.stack([n[np.argsort(n[:, 2], kind="stable")[len(n) // 2]] for n in near])
    moved = np.abs(faces[:, :2] - middle[:, :2]).max(1) / middle[:, 2]
    plausible = (moved < 0.5) & (np.abs(np.log(faces[:, 2] / middle[:, 2])) < 0.25)
    return plausible if plausible.any() else ~plausible


def _local_lines(seconds: np.ndarray, faces: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Fit locally weighted lines to faces (n, 14) at `seconds` (n,); return their values (m, 14) at `times` (m,).

    Widths get only a local mean: a head does not grow while it is out of sight.
    """
    centred_faces = faces.copy()
    centred_faces[:, :2] = middle_of(faces)  # centres move; corners also shift as sizes flicker
    out = np.empty((len(times), faces.shape[1]))
    far = 8 * SMOOTH_SECONDS  # whose weight is nothing; a stretch has no gap as long
    for i, time in enumerate(times):
        near = slice(*np.searchsorted(seconds, (time - far, time + far)))
        offset, values = seconds[near] - time, centred_faces[near]
        weight = np.exp(-0.5 * (offset / SMOOTH_SECONDS) ** 2) + 1e-9
        mean_offset = np.average(offset, weights=weight)
        mean = np.average(values, axis=0, weights=weight)
        centred = offset - mean_offset
        slope = (weight * centred) @ (values - mean) / (weight @ centred**2 + 0.1 * weight.sum() * SMOOTH_SECONDS**2)
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
    """Make a track from boxes that the user gives instead of a detector's.

    Args:
        boxes: one box [x, y, w, h] for the whole clip; or a list of boxes, one a frame; or a list of
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
            f"face_box={str(boxes)[:80]}: give x,y,w,h, or a JSON list of one box a frame or of "
            '{"time": seconds, "box": [x, y, w, h]}'
        ) from error
    if len(values) < frames:
        raise FaceError(f"face_box has boxes for {len(values)} frames, the clip has {frames} at {fps:g} a second")
    if not (np.isfinite(values).all() and (values[:, 2:] > 0).all()):
        raise UserError(f"face_box={str(boxes)[:80]}: widths and heights must be larger than 0")
    faces = with_points(values)
    return FaceTrack(faces[:, BOX], faces[:, POINTS].reshape(-1, 5, 2), np.ones(frames, bool))


def landmark_track(landmarks: np.ndarray, present: np.ndarray, fps: float) -> FaceTrack:
    """Make the track of a face whose landmarks (T, P, 2), 68 or 5, are known where `present` (T,)."""
    points = five_points(landmarks)
    faces = [(i, np.array([[*box_of_points(points[i]), *points[i].ravel()]])) for i in np.flatnonzero(present)]
    track = _smooth(_link(faces, fps), len(points), fps)
    return _check_coverage(replace(track, seen=present, landmarks=landmarks), fps)
