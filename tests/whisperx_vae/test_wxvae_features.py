"""Whisper's log-mel: equal to transformers' extractor. Axes: B batch, N samples, M bands, F frames."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from engine.nn.mel import log_mel, pad_or_trim


def speechlike(samples, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 16_000
    wave = 0.3 * np.sin(2 * np.pi * (150 + 30 * t) * t) + 0.02 * rng.standard_normal(samples)
    return torch.from_numpy(wave.astype(np.float32))


@pytest.mark.parametrize("bands", [80, 128])
def test_equals_transformers(bands):
    extractor = WhisperFeatureExtractor(feature_size=bands)
    waves = [speechlike(20_000), 0.01 * speechlike(31 * 16_000, 1)]  # one shorter and one longer than the window
    expected = extractor([w.numpy() for w in waves], sampling_rate=16_000, return_tensors="pt").input_features
    actual = log_mel(torch.stack([pad_or_trim(w, 480_000) for w in waves]), bands)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
