"""Similarities, warps and the pictures of mouth and face that they make, from landmarks of a whole clip."""

import cv2
import numpy as np
import pytest

from engine.errors import UserError
from engine.faces.track import FaceTrack, fill_landmarks
from hicodit.conditions import align
from hicodit.conditions.upstream import UpstreamEncoderConfig

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


def test_missing_landmarks_lie_between_their_neighbours():
    landmarks = np.arange(6.0)[:, None, None] * np.ones((6, 4, 2))
    present = np.array([False, True, False, False, True, False])
    filled = fill_landmarks(np.where(present[:, None, None], landmarks, 99), present)
    assert np.allclose(filled[:, 0, 0], [1, 1, 2, 3, 4, 4])
    with pytest.raises(ValueError, match="no frame"):
        fill_landmarks(landmarks, np.zeros(6, bool))


def test_landmarks_are_averaged_forwards():
    """The transform of frame 0 of AV-HuBERT's preparation depends on the frames after it, not on those before."""
    points = np.tile(align.MEAN_STABLE, (20, 1, 1))
    points[12:] += 5
    shift = align.avhubert_poses(points, points)[0][:, 0, 2]
    assert shift[0] == pytest.approx(0, abs=1e-9) and shift[1] == pytest.approx(-5 / 12)
    assert np.allclose(shift[8:], shift[8])  # the last full window serves the rest
    assert align.avhubert_poses(points[:3], points[:3])[0].shape == (3, 2, 3)


def test_the_crop_from_five_points_is_that_from_68_for_a_face_of_mean_shape():
    """Turned, shrunk and enlarged; a face of another shape has its eyes' corners elsewhere, which five points hide."""
    noise = np.random.default_rng(0).integers(0, 256, (240, 240, 3), dtype=np.uint8)
    picture = cv2.GaussianBlur(noise, (0, 0), 4)
    picture = np.clip(5.0 * (picture - picture.mean()) + 128, 0, 255).astype(np.uint8)
    landmarks = np.zeros((68, 2))
    landmarks[list(align.STABLE)] = align.MEAN_STABLE
    landmarks[align.MOUTH] = align.MEAN_MOUTH + np.linspace(-15, 15, 20)[:, None] * [1, 0]
    for angle, scale in ((0.0, 1.0), (0.3, 0.8), (-0.2, 1.3)):
        pose = cv2.getRotationMatrix2D((120.0, 120.0), np.degrees(angle), scale)
        pose[:, 2] += 120 - align.transform(pose, align.MEAN_MOUTH[None])[0]
        points = align.transform(pose, landmarks)
        eyes = [points[36:40:3].mean(0), points[42:46:3].mean(0)]
        five = np.array([*eyes, points[33], points[48], points[67]])
        official, ours = (align.avhubert_mouth(picture[None], align.mouth_poses(p[None])) for p in (points, five))
        # One pixel aside, the mean difference is above 2.
        assert np.abs(ours.astype(int) - official).max() <= 2


@pytest.mark.parametrize("frames", [7, 40, 45])
def test_a_clip_in_blocks_is_cut_as_in_one(frames):
    """The window of a block's last frames reaches into the next block, and the clip's last window serves its end."""
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 256, (frames, 60, 80, 3), dtype=np.uint8)
    landmarks = rng.normal(size=(68, 2)) * 12 + (40, 30) + rng.normal(size=(frames, 1, 2))
    track = FaceTrack(np.zeros((frames, 4)), np.zeros((frames, 5, 2)), np.ones(frames, bool), landmarks)
    cut = UpstreamEncoderConfig().crop_mouth
    blocks = [cut(clip[start : start + 16], track, start) for start in range(0, frames, 16)]
    assert np.array_equal(np.concatenate(blocks), cut(clip, track))
    assert np.array_equal(cut(clip, track), align.avhubert_mouth(clip, align.mouth_poses(landmarks)))
