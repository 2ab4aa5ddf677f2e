"""Landmarks of a face in every frame: dlib's, those of a stand-in for it, YuNet's, and those of a file."""

import importlib.util
import json
import os
import pickle
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from drawn_faces import scene, talking_head

from engine.errors import UserError
from engine.faces.clip import ArrayFrames, ClipFrames, find_faces, place_landmarks
from engine.faces.detectors import box_of_points, five_points
from engine.faces.landmarks import Dlib68, add_landmarks, nearest_face, read_landmarks, write_faces
from engine.faces.track import track_of_boxes
from engine.media.video import read_video, write_video
from hicodit.conditions.align import mouth_poses, transform

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "samples" / "reference_video.mp4"
SHAPE = np.stack([np.arange(68) % 9 - 4.0, np.arange(68) // 9 - 3.0], 1)  # of 68 landmarks round their middle
ABSENT = np.arange(20) % 7 == 3


class Rectangle:
    def __init__(self, left, top, right, bottom):
        self.left, self.top, self.right, self.bottom = (lambda v=v: v for v in (left, top, right, bottom))
        self.width = lambda: right - left + 1


@pytest.fixture
def fake_dlib(monkeypatch):
    """Stands in for dlib where the extra is not installed: the face is a bright dot, the landmarks lie round it."""
    calls = SimpleNamespace(looks=0, boxes=[], found=True)

    def dot(picture):
        rows, columns = np.nonzero(picture[..., 0] > 128)
        return np.array([columns.mean(), rows.mean()])

    def detect(picture):
        calls.looks += 1
        x, y = dot(picture).round().astype(int).tolist()
        return [Rectangle(x - 50, y - 50, x + 49, y + 49)] if calls.found else []

    def predict(picture, box):
        calls.boxes.append((box.left(), box.top(), box.right(), box.bottom()))
        points = dot(picture) + 6 * SHAPE
        return SimpleNamespace(parts=lambda: [SimpleNamespace(x=x, y=y) for x, y in points])

    fake = SimpleNamespace(
        get_frontal_face_detector=lambda: detect, shape_predictor=lambda path: predict, rectangle=Rectangle
    )
    monkeypatch.setitem(sys.modules, "dlib", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=["x"]))
    return calls


def dots(frames: int) -> tuple[np.ndarray, np.ndarray]:
    """A clip with a bright dot that moves, and where it is."""
    clip = np.zeros((frames, 120, 160, 3), np.uint8)
    at = np.stack([70 + np.arange(frames), np.full(frames, 60)], 1)
    for frame, (x, y) in zip(clip, at):
        frame[y - 1 : y + 2, x - 1 : x + 2] = 255
    return clip, at


def test_landmarks_are_found_in_every_frame_and_dlib_looks_at_every_fifth(fake_dlib):
    clip, at = dots(20)
    track = track_of_boxes([[x - 30, y - 34, 60, 60] for x, y in at.tolist()], 20)
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    centre = track.points.mean(1, keepdims=True)
    track.points[:] = centre + (track.points - centre) @ turn.T
    found = add_landmarks([clip[:7], clip[7:]], track, Dlib68()).landmarks
    scale = 60 / 256
    assert np.abs(found - (at[:, None] + 6 * scale * SHAPE @ turn.T)).max() < 0.6  # turned back with the head
    assert fake_dlib.looks == 4 and len(fake_dlib.boxes) == 60
    widths = {right - left for left, _, right, _ in fake_dlib.boxes[1::3]}
    assert widths == {200}  # dlib's box in the predictor's picture, twice as large as the detector's

    track.seen[8:12] = False
    gap = add_landmarks([clip], track, Dlib68()).landmarks
    assert np.allclose(gap[8:12].mean(1), np.linspace(gap[7], gap[12], 6)[1:-1].mean(1))
    fake_dlib.found = False  # then the place that dlib's box usually has in the tracked one
    assert np.abs(add_landmarks([clip], track, Dlib68()).landmarks - gap).max() < 1e-9
    assert all(abs(right - left - 195) <= 1 for left, _, right, _ in fake_dlib.boxes[-2::-3][:16])


def test_dlib_finds_drawn_faces():
    pytest.importorskip("dlib", reason="the extra landmarks is not installed")
    for clip, side, corner in ((talking_head(10), 128, (0, 0)), (scene(10, [lambda i: (90, 10, 96)]), 96, (90, 10))):
        found = add_landmarks([clip], find_faces([clip], 25.0)[0], Dlib68()).landmarks
        true = np.array([[49, 60], [79, 60], [64, 76], [50, 90], [78, 90]]) * side / 128 + np.array(corner)
        off = np.linalg.norm(five_points(found) - true, axis=-1).mean(0) / (30 * side / 128)
        assert off.max() < 0.2  # of the eyes' distance; drawn eyes have no corners


def test_tracked_landmarks_are_those_of_dlib_alone_on_a_real_clip():
    dlib = pytest.importorskip("dlib", reason="the extra landmarks is not installed")
    if not SAMPLE.is_file():
        pytest.skip("no real clip in ../shared/samples")
    clip = ClipFrames(SAMPLE, 25.0, frames=41)
    track = add_landmarks(clip, find_faces(clip, 25.0)[0], Dlib68())
    finder = Dlib68()
    frames = read_video(SAMPLE, 25)
    poses = mouth_poses(track.landmarks)
    for i in range(0, 41, 8):
        (box,) = dlib.get_frontal_face_detector()(frames[i], 0)
        alone = np.array([(p.x, p.y) for p in finder.predict(frames[i], box).parts()], float)
        scale = np.linalg.norm(alone[36:48].mean(0) - alone[48:].mean(0))
        assert np.linalg.norm(track.landmarks[i, 48:].mean(0) - alone[48:].mean(0)) < 0.05 * scale
        size = np.sqrt(np.linalg.det(poses[i, :, :2]))  # the mouth is in the crop's middle
        assert np.linalg.norm(transform(poses[i], alone[48:]).mean(0) - 48) < 0.05 * scale * size + 0.71


def test_yunet_returns_the_landmarks_of_the_tracked_face():
    five = np.array([[20.0, 30], [60, 34], [40, 50], [25, 70], [58, 73]])

    def detector(frame):
        faces = [np.concatenate([box_of_points(p), p.ravel()]) for p in (five + 90, five + frame[0, 0, 0])]
        return np.stack(faces if frame[0, 0, 0] != 3 else faces[:1])

    frames = np.zeros((6, 200, 200, 3), np.uint8)
    frames[:, 0, 0, 0] = np.arange(6)
    track = track_of_boxes(box_of_points(five).tolist(), 6)
    finder = partial(nearest_face, detector)
    found = add_landmarks([frames], track, finder).landmarks
    assert np.allclose(found, five + np.arange(6)[:, None, None])  # that of frame 3 lies between its neighbours'
    with pytest.raises(UserError, match="no frame of the clip has landmarks"):
        add_landmarks([frames], track_of_boxes([150, 10, 8, 8], 6), finder)


def face(count: int) -> np.ndarray:
    """Landmarks (20, count, 2) of a frontal face of 100 pixels that moves to the right."""
    five = np.array([[131.0, 39], [169, 39], [150, 60], [136, 79], [164, 79]])
    if count == 68:
        eyes = [np.repeat(five[i : i + 1], 6, 0) for i in (0, 1)]
        mouth = np.repeat(five[3:].mean(0)[None], 20, 0)
        five = np.concatenate([np.repeat(five[2:3], 36, 0), *eyes, mouth])
        five[48] = (136, 79)
        five[54] = (164, 79)
    return five + np.arange(20)[:, None, None] * [1.0, 0]


@pytest.mark.parametrize("kind", ["list", "debug", "npz", "pickle 2", "pickle 5"])
@pytest.mark.parametrize("count", [5, 68])
def test_landmarks_are_read_from_every_kind_of_file(tmp_path, kind, count):
    """All forms hold the same; in a folder they are laid out as the clips."""
    points = face(count)
    rows = [None if gone else p for p, gone in zip(points, ABSENT)]
    path = (tmp_path / "speaker" / "a.x").with_suffix({"n": ".npz", "p": ".pkl"}.get(kind[0], ".json"))
    path.parent.mkdir()
    if kind == "list":
        path.write_text(json.dumps([None if p is None else p.tolist() for p in rows]))
    elif kind == "debug":
        track = place_landmarks(ArrayFrames(np.zeros((20, 90, 300, 3), np.uint8)), points, ~ABSENT, 25.0)
        write_faces(path, track, mouth_poses(track.best_points), 96, 25.0)
        assert json.loads(path.read_text())["fps"] == 25
    elif kind == "npz":
        np.savez(path, landmarks=np.where(ABSENT[:, None, None], np.nan, points))
    else:
        path.write_bytes(pickle.dumps(rows, protocol=int(kind[-1])))
    for where, clip in ((path, "other.mp4"), (tmp_path, "speaker/a.mp4")):
        found, present = read_landmarks(where, clip)
        assert np.array_equal(present, ~ABSENT) and np.allclose(found[present], points[present])
    with pytest.raises(UserError, match=r"looked for .*b\.json"):
        read_landmarks(tmp_path, "speaker/b.mp4")


JSON = ("{", "[]", "[[1, 2], 3]", '{"frames": [{}]}', json.dumps([[[1, 2]] * 4]))


class Program:
    """Makes a folder `run` if it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("run",)

    def __repr__(self):
        return "a program"


@pytest.mark.parametrize("content", [*JSON, Program(), [Program()], pickle.dumps("text"), {"a": 1}, None], ids=repr)
def test_file_of_something_else_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("a.npz" if content is None else "a.json" if content in JSON else "a.pkl")
    if content is None:
        np.savez(path, data=np.array([None, {"facial_landmarks": 1}], object))
    else:
        path.write_bytes(content.encode() if content in JSON else pickle.dumps(content))
    with pytest.raises(UserError, match=path.name):
        read_landmarks(path, "a.mp4")
    assert not (tmp_path / "run").exists()


def test_track_follows_given_landmarks(tmp_path):
    """Boxes follow the face, in the frames that are used; a little too long or too short is the same clip."""
    write_video(tmp_path / "a.mp4", np.zeros((20, 360, 1280, 3), np.uint8), 25)
    clip = ClipFrames(tmp_path / "a.mp4", 25.0)
    points = face(68)
    track = place_landmarks(clip, points, ~ABSENT, 25.0)  # frames of 640 x 180
    assert clip.size == (180, 640) and np.array_equal(track.seen, ~ABSENT)
    assert np.allclose(track.landmarks, points / 2)
    assert np.abs(track.points - five_points(points) / 2).max() < 1.5  # smooth
    assert np.abs(track.boxes - [[50 + i / 2, 0, 50, 50] for i in range(20)]).max() < 1.5
    assert np.array_equal(track[3:5].best_points, track.landmarks[3:5])
    small = ArrayFrames(np.zeros((20, 90, 320, 3), np.uint8), (360, 1280))
    assert np.allclose(place_landmarks(small, points, ~ABSENT, 25.0).landmarks, points / 4)
    longer = place_landmarks(ArrayFrames(np.zeros((23, 90, 320, 3), np.uint8)), points, ~ABSENT, 25.0)
    assert len(longer) == 23 and np.allclose(longer.landmarks[20:], points[19])
    with pytest.raises(UserError, match="landmarks of 20 frames, but the clip has 26 at 25 per second"):
        place_landmarks(ArrayFrames(np.zeros((26, 90, 320, 3), np.uint8)), points, ~ABSENT, 25.0)
    with pytest.raises(UserError, match="no face found in 90%"):
        place_landmarks(small, points, np.arange(20) < 2, 25.0)
