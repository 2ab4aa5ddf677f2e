"""Mouth opening of filmed faces from landmarks."""

import numpy as np
import pytest

from engine.errors import UserError
from engine.metrics.lips import LipOpening, enlarge


@pytest.fixture(scope="module")
def opening():
    pytest.importorskip("dlib")
    pytest.importorskip("face_recognition_models")
    return LipOpening()


def test_small_images_are_enlarged_and_large_ones_kept():
    assert enlarge(np.zeros((64, 128, 3), np.uint8)).shape == (256, 512, 3)
    large = np.zeros((300, 400, 3), np.uint8)
    assert enlarge(large) is large


def test_an_image_without_a_face_is_refused(opening):
    with pytest.raises(UserError, match="no face"):
        opening(np.zeros((2, 64, 64, 3), np.uint8))
