"""The opening of mouths in pictures: of cartoon faces by the reader's fit, of filmed ones by dlib's landmarks."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from corpora.synthetic.expression import pose
from corpora.synthetic.face import Face, draw_motion
from corpora.synthetic.mouth_opening import MouthReader
from corpora.synthetic.visemes import MOUTH, mouth_track
from corpora.synthetic.voices import load_voices
from engine.metrics.lips import EYES, LIPS, LipOpening

PHONEMES = [("b", 0.15, 0.2), ("I", 0.2, 0.35), ("n", 0.35, 0.45)]
PHONEMES += [("w", 0.45, 0.55), ("aI", 0.55, 0.8), ("t", 0.8, 0.9)]


@pytest.fixture(scope="module")
def reader():
    return MouthReader(24)


def clip(voice, expression, seed):
    track = mouth_track(PHONEMES, 26)
    motion = draw_motion(np.random.default_rng(seed), 26, np.linspace(0, 1, 26))
    frames = Face(voice.face).render(track, pose(expression, 0.9), motion)
    return frames, track[:, MOUTH.index("open")]


@pytest.mark.parametrize("expression", ["neutral", "happy", "sad", "disgusted"])
def test_readings_follow_the_drawn_opening(reader, expression):
    unseen = [voice for voice in load_voices() if voice.group == "unseen"]
    for voice in unseen[:3] + unseen[-3:]:
        frames, opening = clip(voice, expression, voice.number)
        assert np.corrcoef(reader(frames), opening)[0, 1] > 0.9


def test_readings_survive_another_size_and_blur(reader):
    frames, opening = clip(next(voice for voice in load_voices() if voice.group == "unseen"), "angry", 3)
    small = [cv2.resize(frame, (96, 96), interpolation=cv2.INTER_AREA) for frame in frames]
    small = np.stack([cv2.GaussianBlur(frame, (0, 0), 1) for frame in small])
    assert np.corrcoef(reader(small), opening)[0, 1] > 0.9
    assert np.abs(reader(small) - reader(frames)).max() < 0.2


@pytest.fixture
def pictures(monkeypatch):
    """Replaces dlib, an extra: notes the pictures that it gets. Eyes are 40 pixels apart, lips 10."""
    seen = []
    points = np.zeros((68, 2))
    points[EYES[1]] = (40, 0)
    points[LIPS[1]] = (0, 10)
    shape = SimpleNamespace(part=lambda number: SimpleNamespace(x=points[number][0], y=points[number][1]))

    def detect(picture, doublings):
        seen.append(picture)
        return [SimpleNamespace(area=lambda: 1)]

    def predict(picture, box):
        seen.append(picture)
        return shape

    dlib = SimpleNamespace(get_frontal_face_detector=lambda: detect, shape_predictor=lambda path: predict)
    models = SimpleNamespace(pose_predictor_model_location=lambda: "")
    monkeypatch.setitem(sys.modules, "dlib", dlib)
    monkeypatch.setitem(sys.modules, "face_recognition_models", models)
    return seen


@pytest.mark.parametrize(("size", "enlarged"), [((64, 96), (256, 384)), ((300, 400), (300, 400))])
def test_small_frames_are_enlarged_before_lips_are_measured(pictures, size, enlarged):
    opening = LipOpening()(np.zeros((2, *size, 3), np.uint8))
    assert [picture.shape[:2] for picture in pictures] == [
        enlarged
    ] * 3  # the first frame's face, then both frames' lips
    assert opening.tolist() == [0.25, 0.25]
