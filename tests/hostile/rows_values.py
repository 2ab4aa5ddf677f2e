"""Settings, sizes and tensors that no function can use: each value is refused by name."""

from pathlib import Path

import torch

from engine.faces.track import read_face
from engine.media.video import read_video
from engine.settings import check_place
from engine.training.settings import TrainerConfig
from hicodit.conditions import encoder_config
from hicodit.model import ModelConfig
from hicodit.settings import InferConfig as HiCoDiTInferConfig
from hicodit.settings import find_clips
from hicodit.streaming import StreamSettings
from lia_x import LiaX, LiaXConfig
from rvq_codec import RVQCodec, RVQCodecConfig
from service.voices import Voices
from talker_t2av.jobs import Job
from talker_t2av.model import TalkerConfig, TalkerT2AV
from talker_t2av.settings import InferConfig, read_jobs
from talker_t2av.system import MotionStats
from tests.engine.toy_task import CONFIG
from tests.talker_t2av.talker_fixtures import LLM
from tests.tiny import LIA_X, RVQ, WHISPERX_VAE
from whisperx_vae import WhisperXVAE, WhisperXVAEConfig

NAN = float("nan")


def encode_rvq(*shape: int) -> None:
    RVQCodec(RVQCodecConfig(**RVQ)).encode(torch.zeros(shape))


def decode_rvq(code: int) -> None:
    RVQCodec(RVQCodecConfig(**RVQ)).decode(torch.full((1, 3, 3), code))


def encode_vae(samples: int) -> None:
    codec = WhisperXVAE(WhisperXVAEConfig(**WHISPERX_VAE))
    codec.encode_window(torch.zeros(1, 1, samples), torch.zeros(1, 20, 40))


def encode_lia_x(size: int) -> None:
    LiaX(LiaXConfig(**LIA_X)).encode(torch.zeros(2, 3, size, size))


VALUES = {  # name: (what uses the value, pattern of the error)
    "a boolean as a number": (lambda: LiaXConfig(width=True), "width=True must be a whole number"),
    "a number as text": (lambda: ModelConfig(hierarchical="no"), "hierarchical=no must be true or false"),
    "not a number": (lambda: Job("tts", "a", "v.wav", min_seconds=NAN), "min_seconds=nan must be"),
    "three betas": (lambda: TrainerConfig(**CONFIG | {"betas": (0.1, 0.1, 0.1)}), "betas=.* must be two numbers"),
    "statistics of motion": (lambda: MotionStats(torch.tensor([NAN]), torch.ones(1)), "finite numbers"),
    "lookahead": (lambda: StreamSettings(lookahead=99.0), r"stream\.lookahead"),
    "LIA-X motion_dim": (lambda: LiaXConfig(style_dim=16, motion_dim=17, scale=1), "motion_dim=17 exceeds"),
    "RVQ ratios": (lambda: RVQCodec(RVQCodecConfig(ratios=(2, 2))), "hop of 4"),
    "encoders, unknown field": (lambda: encoder_config({"kind": "upstream", "lip_size": 3}), "lip_size"),
    "talker heads": (lambda: TalkerT2AV(TalkerConfig(LLM, encoder_heads=5, head_heads=2)), "encoder_heads=5"),
    "talker delay": (lambda: TalkerConfig({}, order="av", delay=1), "delay=0"),
    "RVQ waveform without a channel": (lambda: encode_rvq(1, 51), r"shape \(1, 51\)"),
    "RVQ unknown code": (lambda: decode_rvq(16), r"0\.\.15"),
    "VAE waveform too long": (lambda: encode_vae(26 * 960), "longer than Whisper's window: expected at most 9600"),
    "LIA-X picture size": (lambda: encode_lia_x(64), "32 x 32"),
    "video path with a null byte": (lambda: read_video("a\0.mp4"), "no such file"),
    "jobs from an endless file": (
        lambda: read_jobs(InferConfig(jobs="/dev/zero", mode="tts")),
        "has more than 268,435,456 bytes",
    ),
    "devices, five thousand digits": (lambda: check_place("processes", "9" * 5000), "must be a number from 1 to 64"),
    "devices, a superscript": (lambda: check_place("processes", "²"), "must be a number from 1 to 64"),
    "face, five thousand digits": (lambda: read_face("9" * 5000), "is unknown: choose largest"),
}


def find_voice(folder: Path) -> None:
    Voices(None, folder).find("a/../../../b")


def write_over_a_folder(folder: Path) -> None:
    """Request word timestamps where a folder has the name of an output file."""
    (folder / "a.mp4").write_bytes(b"x")
    (folder / "out" / "a.json").mkdir(parents=True)
    find_clips(HiCoDiTInferConfig(input=str(folder / "a.mp4"), output=str(folder / "out"), timestamps=True))


CASES = [
    *((f"value: {name}", lambda _, call=call: call(), line) for name, (call, line) in VALUES.items()),
    ("voice: a path", find_voice, "is unknown; available: none"),
    ("output: a name that a folder has", write_over_a_folder, "cannot write .*a.json: it is a folder"),
]
