"""LIA-X as a whole: chunks and pictures at toy size, bfloat16 with the bundled weights. Axes: T frames, S side."""

from pathlib import Path

import numpy as np
import torch

from engine.media.pictures import identity_to_tensor, to_bytes, video_to_tensor
from engine.metrics.picture import psnr
from lia_x import LiaX, LiaXConfig
from talker_t2av.system import load_motion

ASSETS = Path(__file__).resolve().parents[2] / "assets"


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


@torch.no_grad()
def test_the_bundled_codec_draws_nearly_the_same_faces():
    codec = load_motion(ASSETS / "lia_x_real")
    g = torch.Generator().manual_seed(0)
    face = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8, generator=g), codec.size, mode="bilinear")[0] * 2 - 1
    motion = codec.encode(face[None]) + 0.3 * torch.randn(3, codec.channels, generator=g)
    plain = codec.decode(motion, face)
    codec.dtype = torch.bfloat16
    half = codec.decode(motion, face)
    assert half.dtype == torch.float32 and not torch.equal(half, plain)
    assert psnr(half.clamp(-1, 1), plain.clamp(-1, 1)) > 45
