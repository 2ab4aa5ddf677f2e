"""Rows of sizes that do not go together, and of waves, codes, pictures and motion that a codec cannot take."""

from __future__ import annotations

from functools import cache, partial

import torch

from hicodit.conditions import encoder_config
from hicodit.conditions.avhubert import AVHubertConfig
from hicodit.streaming import StreamSettings
from lia_x import LiaX, LiaXConfig
from rvq_codec import RVQCodec, RVQCodecConfig
from talker_t2av.model import TalkerConfig, TalkerT2AV
from talker_t2av.speaker.encoder import EcapaTDNN
from tests.talker_t2av.talker_fixtures import LLM
from tests.tiny import LIA_X, RVQ, WHISPERX_VAE
from whisperx_vae import WhisperXVAE, WhisperXVAEConfig

SIZES = {  # what makes a configuration or a network, and the line
    "AV-HuBERT layers": (lambda: AVHubertConfig(layers=-1), "layers=-1 must be a whole number from 0 to 256"),
    "ECAPA channels": (lambda: EcapaTDNN(4, channels=12), "multiple of 8"),
    "LIA-X width": (lambda: LiaXConfig(width=True), "width=True must be a whole number"),
    "LIA-X motion": (lambda: LiaXConfig(style_dim=16, motion_dim=17, scale=1), "motion_dim=17 exceeds"),
    "RVQ hop": (lambda: RVQCodec(RVQCodecConfig(ratios=(2, 2))), "hop of 4"),
    "VAE ratios": (lambda: WhisperXVAEConfig(decoder_ratios=(2, 2)), "decoder_ratios"),
    "VAE heads": (lambda: WhisperXVAEConfig(hidden=33), "hidden=33"),
    "VAE decoder": (lambda: WhisperXVAEConfig(decoder_width=20), "cannot be halved"),
    "encoders' kind": (lambda: encoder_config({"kind": "huge"}), "encoders.kind=huge is unknown"),
    "encoders' fields": (lambda: encoder_config({"kind": "upstream", "lip_size": 3}), "lip_size"),
    "encoders' faces": (
        lambda: encoder_config({"kind": "upstream", "face_size": 120}),
        "face_size=120: .* a multiple of 112",
    ),
    "lip heads": (
        lambda: encoder_config({"lip_dim": 32, "lip_heads": 6}),
        "lip_heads=6 does not divide lip_dim=32",
    ),
    "lookahead": (lambda: StreamSettings(lookahead=99.0), r"stream\.lookahead"),
    "talker heads": (lambda: TalkerT2AV(TalkerConfig(LLM, encoder_heads=5, head_heads=2)), "encoder_heads=5"),
    "talker delay": (lambda: TalkerConfig({}, order="av", delay=1), "delay=0"),
}


@cache
def rvq() -> RVQCodec:
    return RVQCodec(RVQCodecConfig(**RVQ)).eval()


@cache
def vae() -> WhisperXVAE:
    return WhisperXVAE(WhisperXVAEConfig(**WHISPERX_VAE)).eval()


@cache
def lia() -> LiaX:
    return LiaX(LiaXConfig(**LIA_X)).eval()


def codes(levels: int, frames: int = 3) -> torch.Tensor:
    return torch.zeros(1, levels, frames, dtype=torch.int64)


def window(samples: int, mel_frames: int = 40) -> torch.Tensor:
    return vae().encode_window(torch.zeros(1, 1, samples), torch.zeros(1, 20, mel_frames))


INPUTS = {  # a call of a codec, and the line
    "RVQ: no channel": (lambda: rvq().encode(torch.zeros(1, 51)), r"shape \(1, 51\)"),
    "RVQ: too short": (lambda: rvq().encode(torch.zeros(1, 1, 5)), "5 samples: expected at least"),
    "RVQ: no such code": (lambda: rvq().decode(codes(3) + 16), r"0\.\.15"),
    "RVQ: levels that are not there": (lambda: rvq().decode(codes(2), levels=3), "levels=3"),
    "VAE: too short": (lambda: window(959), "959 samples: expected at least 960"),
    "VAE: too long": (lambda: window(26 * 960), "longer than Whisper's window: expected at most 9600"),
    "VAE: mel": (lambda: window(960, 38), r"mel of shape \(1, 20, 38\)"),
    "VAE: latents": (lambda: vae().decode(torch.zeros(1, 8, 5)), "latents of shape"),
    "LIA-X: size": (lambda: lia().encode(torch.zeros(2, 3, 64, 64)), "32 x 32"),
    "LIA-X: bytes": (lambda: lia().encode(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)), "floats"),
    "LIA-X: chunk": (lambda: lia().decode(torch.zeros(2, 4), torch.zeros(3, 32, 32), chunk=0), "chunk=0"),
}


def call(make, _) -> None:
    make()


CASES = [(name, partial(call, make), line) for name, (make, line) in (SIZES | INPUTS).items()]
