"""LIA-X as a whole, at toy size. Axes: T frames, S side."""

import numpy as np
import torch

from engine.media.pictures import identity_to_tensor, to_bytes, video_to_tensor
from lia_x import LiaX, LiaXConfig


def test_chunks_do_not_change_the_result():
    torch.manual_seed(0)
    model = LiaX(LiaXConfig(style_dim=16, motion_dim=4, scale=1, size=48, width=4, max_width=8, depth=1)).eval()
    video = torch.rand(5, 3, 48, 48) * 2 - 1
    codes = model.encode(video, chunk=5)
    torch.testing.assert_close(model.encode(video, chunk=2), codes)
    frames = model.decode(codes, video[0], chunk=5)
    assert frames.shape == (5, 3, 48, 48)
    torch.testing.assert_close(model.decode(codes, video[0], chunk=2), frames, rtol=1e-3, atol=1e-4)


def test_images_to_and_from_bytes():
    frames = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    tensor = video_to_tensor(frames, 48)
    assert tensor.min() >= -1 and tensor.max() <= 1
    assert np.abs(to_bytes(tensor).astype(int) - frames).max() <= 1  # truncation may lose one step
    assert to_bytes(torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 3, 1, 1)).tolist() == [[[[0, 127, 255]]]]
    assert video_to_tensor(frames, 32).shape == (2, 3, 32, 32)
    assert identity_to_tensor(frames[0], 24).shape == (3, 24, 24)
    flat = np.full((60, 40, 3), 255, np.uint8)
    assert torch.equal(identity_to_tensor(flat, 24), torch.ones(3, 24, 24))
