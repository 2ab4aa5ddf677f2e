"""Clips whose audio and picture are out of step are found by planted lags."""

import torch

from benchmarks.synchrony import LARGEST, predict


def test_planted_lags_are_found():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(16, 20, generator=generator)
    movement = torch.randn(24, 75, 16, generator=generator).cumsum(1)
    mouths = movement - movement.mean(1, keepdim=True)
    sounds = mouths @ mixing + 0.5 * torch.randn(24, 75, 20, generator=generator)
    lags = torch.zeros(24, dtype=torch.long)
    lags[[3, 11, 20]] = torch.tensor([4, -5, 7])
    sounds = torch.stack([torch.roll(sound, int(lag), 0) for sound, lag in zip(sounds, lags)])
    _, agreement = predict(mouths, sounds)
    assert (agreement.argmax(1) - LARGEST).tolist() == lags.tolist()
