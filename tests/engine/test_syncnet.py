"""SyncNet: offsets, and a whole clip."""

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.metrics.lip_sync import SHIFT, SyncNet, mfcc, sync_score


@pytest.mark.parametrize("early", [-4, 0, 7])
def test_offset_is_the_shift_of_the_sound(early):
    torch.manual_seed(0)
    lip = torch.randn(60, 16)
    score = sync_score(lip, torch.roll(lip, -early, 0))
    assert score.offset == early
    assert score.confidence > 1
    assert sync_score(lip, torch.roll(lip, -early, 0), shift=8).offset == early
    assert score.distances.shape == (60, 2 * SHIFT + 1)


def test_silence_and_short_sounds_have_finite_mfcc():
    assert np.isfinite(mfcc(np.zeros(1600))).all()
    assert mfcc(np.ones(100)).shape == (13, 1)
    assert mfcc(np.ones(560)).shape == (13, 2)
    assert mfcc(np.ones(561)).shape == (13, 3)


def test_a_clip_is_cut_into_windows_and_turned_to_bgr():
    torch.manual_seed(0)
    model = SyncNet().eval()
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (8, 40, 40, 3), dtype=np.uint8)
    wave = 0.1 * rng.standard_normal(640 * 7 + 100).astype(np.float32)
    lip, audio = model.embed(frames, wave)
    assert lip.shape == audio.shape == (2, 1024)
    other, _ = model.embed(frames[..., ::-1], wave)
    assert not torch.allclose(lip, other)
    with pytest.raises(UserError, match="more than 5 frames"):
        model.embed(frames[:5], wave)
