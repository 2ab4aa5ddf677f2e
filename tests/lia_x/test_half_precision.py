"""Faces drawn in bfloat16: close to those in float32, and asked for by the model's precision."""

from pathlib import Path

import torch

from engine.metrics.picture import psnr
from talker_t2av.pipeline import TalkerPipeline
from talker_t2av.system import load_motion

ASSETS = Path(__file__).resolve().parents[2] / "assets"


@torch.no_grad()
def test_the_bundled_codec_draws_nearly_the_same_faces():
    codec = load_motion(ASSETS / "lia_x_tiny")
    g = torch.Generator().manual_seed(0)
    face = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8, generator=g), codec.size, mode="bilinear")[0] * 2 - 1
    motion = codec.encode(face[None]) + 0.3 * torch.randn(3, codec.channels, generator=g)
    plain = codec.decode(motion, face)
    codec.dtype = torch.bfloat16
    half = codec.decode(motion, face)
    assert half.dtype == torch.float32 and not torch.equal(half, plain)
    assert psnr(half.clamp(-1, 1), plain.clamp(-1, 1)) > 45


def test_the_pipeline_draws_in_the_models_precision():
    assert TalkerPipeline.from_pretrained(precision="bf16").system.motion.dtype == torch.bfloat16
