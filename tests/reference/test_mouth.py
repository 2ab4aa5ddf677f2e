"""AV-HuBERT's mouth crop: landmarks over time, the crop from five points beside that from 68, blocks of a clip."""

import cv2
import numpy as np
import pytest

from engine.faces.landmarks import fill_landmarks
from engine.faces.track import FaceTrack
from hicodit.conditions import align
from hicodit.conditions.upstream import UpstreamEncoderConfig


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
