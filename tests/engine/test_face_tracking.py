"""Face tracking on synthetic videos of hard cases."""

import json
import weakref
from unittest.mock import create_autospec

import cv2
import numpy as np
import pytest
from drawn_faces import draw_face, scene

from engine.errors import UserError
from engine.faces.clip import ArrayFrames, ClipFrames, find_faces, place_face
from engine.faces.detectors import HaarDetector, YuNetDetector, box_of_points, with_points
from engine.faces.track import DETECT_EVERY, read_boxes, track_faces, track_of_boxes
from engine.media.video import write_video

SIDE = 96  # of a drawn head; its face box is about 0.7 of it
HAAR = HaarDetector()


def track_face(*arguments, **settings):
    return track_faces(*arguments, **settings)[0]


def centre(track) -> np.ndarray:
    return track.boxes[:, 0] + track.boxes[:, 2] / 2


def near(track, frames, x: float) -> bool:
    """Whether the box's centre is within a tenth of a head of x in these frames, sizes included."""
    part = track[frames]
    return bool((np.abs(centre(part) - x) < SIDE / 8).all() and (part.boxes[:, 2] > SIDE / 3).all())


def test_largest_central_or_numbered_face_is_followed():
    def large(i):
        return (5, 5, 112)

    def central(i):
        return (130, 20, 64)

    video = scene(30, [large, central])
    assert near(track_face([video], HAAR), slice(None), 5 + 56)
    for face, x in (("central", 162), (1, 61), (2, 162), ("left", 61), ("right", 162)):
        assert near(track_face([video], HAAR, face=face), slice(None), x)
    assert [round(centre(track)[0], -1) for track in track_faces([video], HAAR, face="all")] == [60, 160]
    with pytest.raises(UserError, match="face=3"):
        track_face([video], HAAR, face=3)


def looks(count):
    """Frames in which a detector finds the number of its look in the first byte."""
    frames = np.zeros((count * DETECT_EVERY, 8, 8, 3), np.uint8)
    frames[:, 0, 0, 0] = np.arange(len(frames)) // DETECT_EVERY
    return [frames]


def test_a_face_detected_at_two_sizes_counts_once():
    def detector(frame):
        return np.array([[20.0, 20, 60, 60], [30.0, 30, 30, 30], [200.0, 20, 50, 50]])

    tracks = track_faces(looks(8), detector, face="all")
    assert [track.boxes[0, 0] for track in tracks] == [20, 200]


def test_two_faces_that_cross_keep_their_sizes():
    """The nearer head passes in front of the other: the track stays on it."""

    def front(i):
        return (10 + 3 * i, 5, 112)

    track = track_face([scene(60, [lambda i: (140, 30, 64), front])], HAAR)
    assert np.abs(centre(track) - (10 + 56 + 3 * np.arange(60)))[5:55].max() < 20


def test_alternating_detections_do_not_pull_the_track_between_two_faces():
    """Where the detector's favourite alternates, the track stays on a face instead of the empty centre."""

    def detector(frame):
        left = frame[0, 0, 0] % 2 == 0
        return np.array([[10.0, 10, 40, 40] if left else [200.0, 10, 41, 41]])

    x = track_face(looks(20), detector).boxes[:, 0]
    assert ((np.abs(x - 10) < 5) | (np.abs(x - 200) < 5)).all()


def test_face_that_leaves_and_comes_back_elsewhere_is_followed():
    def head(i):
        return (10, 10, SIDE) if i < 40 else (200, 10, SIDE) if i >= 90 else None

    track = track_face([scene(130, [head])], HAAR)
    assert near(track, slice(0, 38), 10 + 48) and near(track, slice(92, None), 200 + 48)
    assert track.seen[:38].all() and not track.seen[45:85].any() and track.seen[92:].all()
    assert track.unseen(25.0).startswith("1.")


def test_larger_of_two_faces_is_the_same_person_after_two_seconds_away():
    def large(i):
        return None if 40 <= i < 90 else (180, 5, 112)

    video = scene(150, [large, lambda i: (20, 30, 80)])
    track = track_face([video], HAAR)
    assert near(track, track.seen, 180 + 56) and 0.6 < track.coverage < 0.75
    assert near(track_face([video], HAAR, face=2), slice(None), 60)


@pytest.mark.parametrize(
    ("frames", "head", "expected"),
    [  # expected: x of the centre of the followed face by frame
        (90, lambda i: None if 30 <= i < 45 else (10 + i, 10, SIDE), {i: 58 + i for i in range(90)}),
        (100, lambda i: (10, 10, SIDE) if i < 50 else (210, 10, SIDE), {47: 58, 53: 258}),
        (60, lambda i: (60, 4, 60 + (50 * i) // 59), {0: 90, 59: 115}),
        (30, lambda i: (0, 0, SIDE), {0: 48, 29: 48}),
    ],
    ids=["a gap of 0.6 s is interpolated", "a cut is not", "zoom", "at the border"],
)
def test_a_single_face_is_seen_in_all_frames(frames, head, expected):
    track = track_face([scene(frames, [head])], HAAR)
    assert track.seen.all() and track.unseen(25.0) == ""
    assert np.abs(centre(track)[list(expected)] - list(expected.values())).max() < 12
    assert track.boxes[-1, 2] / track.boxes[0, 2] == pytest.approx(head(frames - 1)[2] / head(0)[2], rel=0.25)


def test_isolated_false_detections_are_dropped():
    def detector(frame):
        boxes = [[100.0, 10, 60, 60]] if frame[0, 0, 0] % 3 else []
        return np.array(boxes + ([[10.0, 10, 90, 90]] if frame[0, 0, 0] in (4, 11) else [])).reshape(-1, 4)

    assert np.allclose(track_face(looks(20), detector).boxes, [100, 10, 60, 60])


def test_a_long_clip_is_streamed():
    """Frames go by, only their detections stay: of forty blocks no more than two are alive at once."""
    alive: list[weakref.ref] = []

    def blocks():
        for _ in range(40):
            block = np.zeros((50, 8, 8, 3), np.uint8)
            alive.append(weakref.ref(block))
            yield block
            del block
            assert sum(reference() is not None for reference in alive) <= 2

    track = track_face(blocks(), lambda frame: np.array([[10.0, 10, 40, 40]]))
    assert len(track) == 2000 and track.seen.all()


def test_track_follows_the_users_boxes(tmp_path):
    assert np.allclose(track_of_boxes(read_boxes("10,20,30,40"), 7).boxes, [10, 20, 30, 40])
    path = tmp_path / "track.json"
    path.write_text(json.dumps([{"time": 0, "box": [0, 0, 50, 50]}, {"time": 1, "box": [25, 0, 50, 50]}]))
    moving = track_of_boxes(read_boxes(str(path)), 40)
    assert np.allclose(moving.boxes[:26, 0], np.arange(26)) and np.allclose(moving.boxes[26:, 0], 25)
    path.write_text(json.dumps([[i, 0, 50, 50] for i in range(9)]))
    assert np.allclose(track_of_boxes(read_boxes(str(path)), 9).boxes[:, 0], np.arange(9))
    (tmp_path / "damaged.json").write_text("{")
    for text, word in (("1,2,3", "x,y,w,h"), (str(path), "9 frames"), (f"{tmp_path}/damaged.json", r"damaged\.json")):
        with pytest.raises(UserError, match=word):
            track_of_boxes(read_boxes(text), 10)
    frames = ArrayFrames(np.zeros((10, 80, 120, 3), np.uint8))
    with pytest.raises(UserError, match=r"face_box=200,10,30,30 .*outside"):
        place_face(frames, [200, 10, 30, 30], 25.0)


def test_boxes_and_points_agree():
    box = np.array([30.0, 40, 80, 80])
    points = with_points(box[None])[0, 4:].reshape(5, 2)
    assert np.allclose(box_of_points(points), box)
    points[:, 0] = 70 + (points[:, 0] - 70) * 0.5  # a turned head is narrower, and no smaller
    assert np.allclose(box_of_points(points)[2:], 80)


def test_yunet_gets_bgr_of_at_most_320_pixels_and_its_faces_are_scaled_to_the_frame(tmp_path, monkeypatch):
    """`cv2.FaceDetectorYN` is replaced: its network file is not in the repository."""
    points = np.array([[70, 60], [100, 62], [86, 76], [74, 92], [98, 93]])
    network = create_autospec(cv2.FaceDetectorYN, instance=True)
    network.detect.return_value = 1, np.array([[60, 40, 50, 70, *points.ravel(), 0.93]], np.float32)
    create = create_autospec(cv2.FaceDetectorYN.create, return_value=network)
    (tmp_path / "yunet.onnx").write_bytes(b"replaced")
    monkeypatch.setattr(cv2.FaceDetectorYN, "create", create)
    detector = YuNetDetector(tmp_path / "yunet.onnx", score=0.8)
    frame = np.zeros((480, 640, 3), np.uint8)
    frame[..., 0] = 200  # red
    faces = detector(frame)
    (picture,) = network.detect.call_args.args
    assert picture.shape == (240, 320, 3) and picture[0, 0].tolist() == [0, 0, 200]  # BGR
    assert faces.shape == (1, 14) and np.allclose(faces[0, 4:], 2 * points.ravel())
    assert np.allclose(faces[0, :4], box_of_points(2 * points))
    network.detect.return_value = 1, None
    assert detector(frame).shape == (0, 14)
    monkeypatch.undo()
    for name in ("absent", "yunet.onnx"):
        with pytest.raises(UserError, match=name):
            YuNetDetector(tmp_path / name)


def test_a_small_face_is_cropped_from_frames_of_full_resolution(tmp_path):
    head = draw_face(0.5, 128)
    frame = np.full((720, 1280, 3), (150, 160, 170), np.uint8)
    frame[300:428, 900:1028] = head
    write_video(tmp_path / "large.mp4", [frame] * 10, 25)
    clip = ClipFrames(tmp_path / "large.mp4", 25.0)
    track = find_faces(clip, 25.0)[0]
    assert clip.size == (360, 640) and clip.display_size == (720, 1280)
    sharp, moved = clip.sharper(track)
    assert sharp.max_side == 1280 and np.abs(centre(moved) - 964).max() < 16
    assert next(iter(sharp)).shape[1:3] == (720, 1280)
    assert np.allclose(moved.boxes, 2 * track.boxes)


@pytest.mark.parametrize("kept", [0, 2**30], ids=["decoded again", "kept in memory"])
def test_a_limited_number_of_frames_is_read_as_often_as_asked(tmp_path, monkeypatch, kept):
    monkeypatch.setattr("engine.faces.clip.KEPT", kept)
    write_video(tmp_path / "a.mp4", scene(70, []), 25)
    clip = ClipFrames(tmp_path / "a.mp4", 25.0, frames=60)
    first, again = (np.concatenate(list(clip)) for _ in range(2))
    assert len(first) == 60 and np.array_equal(first, again)


@pytest.mark.parametrize(("speaker", "sound"), [(0, True), (1, True), (1, False)])
def test_the_speaking_face_is_chosen(speaker, sound):
    """With audio, both mouths move and one of them with the loudness. Without, the other head only moves about."""
    rng = np.random.default_rng(speaker)
    frames = 75
    openings = [np.convolve(rng.random(frames + 6), np.ones(7) / 2, "valid") % 1 for _ in range(2)]
    wave = (rng.normal(0, 0.1, (frames, 640)) * openings[speaker][:, None]).ravel()
    if not sound:
        openings[1 - speaker][:] = 0.2
    video = scene(frames, [])
    for i in range(frames):
        for side, opening in enumerate(openings):
            x = 160 * side + 20 + round(6 * np.sin(i / 5))
            y = 4 + round(3 * np.sin(i / 7))
            video[i, y : y + 112, x : x + 112] = draw_face(opening[i], 112)
    track = find_faces([video[:40], video[40:]], 25.0, "speaking", wave=wave if sound else None)[0]
    assert abs(centre(track).mean() - (76 + 160 * speaker)) < 12


def test_an_opencv_without_cascades_is_refused(monkeypatch):
    monkeypatch.delattr(cv2, "CascadeClassifier")
    with pytest.raises(UserError, match="install"):
        HaarDetector()
