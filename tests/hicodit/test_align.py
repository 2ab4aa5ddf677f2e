"""Similarities, warps and the pictures of mouth and face that they make."""

import cv2
import numpy as np
import pytest

from engine.errors import UserError
from hicodit.conditions import align

RNG = np.random.default_rng(0)
PICTURE = cv2.GaussianBlur(RNG.integers(0, 256, (90, 120, 3), dtype=np.uint8), (0, 0), 1.5)


def turn(angle: float, scale: float, shift: tuple[float, float]) -> np.ndarray:
    c = scale * np.cos(angle)
    s = scale * np.sin(angle)
    return np.array([[c, -s, shift[0]], [s, c, shift[1]]])


def test_a_similarity_transform_is_recovered_and_never_mirrors():
    points = RNG.normal(size=(7, 2))
    true = turn(2.5, 3.1, (40.0, -7.0))
    target = points @ true[:, :2].T + true[:, 2]
    assert np.allclose(align.similarity(points, target), true)
    mirrored = align.similarity(points, points * [-1, 1])
    assert np.linalg.det(mirrored[:, :2]) > 0
    with pytest.raises(UserError, match="coincide"):
        align.similarity(np.ones((5, 2)), target[:5])


def test_aligned_face_puts_the_eyes_where_arcface_wants_them():
    points = align.ARCFACE_POINTS @ turn(0.4, 0.6, (0, 0))[:, :2].T.astype(np.float32) + 20
    for size in (112, 224):
        matrix = align.face_matrix(points, size)
        at = points @ matrix[:, :2].T + matrix[:, 2]
        assert np.allclose((at + 0.5) * 112 / size - 0.5, align.ARCFACE_POINTS, atol=1e-3)
        assert align.face_picture(PICTURE, points, size).shape == (size, size, 3)


@pytest.mark.parametrize("shrink", [4, 8])
def test_a_large_face_keeps_what_its_picture_can_show_and_no_more(shrink):
    """Stripes of four pixels of the result keep their contrast; those of half a pixel would alias, and are gone."""

    def contrast(period: float) -> float:
        x = np.arange(160 * shrink)
        row = np.round(127 + 100 * np.sin(2 * np.pi * x / (period * shrink))).astype(np.uint8)
        picture = np.repeat(np.repeat(row[None, :, None], len(row), 0), 3, 2)
        points = align.ARCFACE_POINTS * shrink + 20
        inner = align.face_picture(picture, points, align.ARCFACE_SIDE)[8:-8, 8:-8].astype(float)
        return inner.std() / (100 / np.sqrt(2))

    assert 0.85 < contrast(4.0) < 0.98
    assert contrast(0.5) < 0.03


def test_mouth_picture_holds_the_mouth_in_its_middle_and_stays_inside():
    points = np.array([[45.0, 30], [75, 30], [60, 45], [50, 62], [70, 62]])
    picture = np.zeros((90, 120, 3), np.uint8)
    cv2.circle(picture, (60, 62), 4, (255, 255, 255), -1)
    mouth = align.avhubert_mouth(picture[None], align.mouth_poses(points[None]))[0]
    y, x = np.argwhere(mouth > 128).mean(0)
    assert mouth.shape == (96, 96) and abs(x - 47.5) < 1.5 and abs(y - 47.5) < 1.5
    poses = align.mouth_poses((points[:, ::-1] * [1, -1] + [0, 119])[None])
    upright = align.avhubert_mouth(np.rot90(picture)[None], poses)[0]
    assert np.abs(upright.astype(int) - mouth).mean() < 2  # a head that lies on its side is set upright


def test_mouth_square_stands_at_the_nearest_whole_pixel_inside_the_frame():
    still = np.tile(np.eye(2, 3), (3, 1, 1))
    poses = align.cut_poses(still, np.array([[100.7, 120.2], [10.0, 250.0], [128.0, 157.82]]))
    assert poses[:, :, 2].tolist() == [[-53, -72], [0, -160], [-80, -110]]


def test_warp_is_opencvs_within_its_fixed_point_positions():
    matrix = turn(0.3, 0.8, (20.0, 3.0))
    theirs = cv2.warpAffine(PICTURE, matrix, (64, 64))
    difference = np.abs(align.warp(PICTURE, matrix, 64).astype(int) - theirs)
    assert difference.max() <= 6 and difference.mean() < 0.5
