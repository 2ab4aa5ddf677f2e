"""Rows of settings: every bounded field of every dataclass, one beyond each end, not a number, and of another type."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

from engine.settings import Limits, require_range
from engine.training.settings import TrainerConfig
from hicodit.conditions.avhubert import AVHubertConfig
from hicodit.conditions.encoders import TinyEncoderConfig
from hicodit.conditions.released import ReleasedEncoderConfig
from hicodit.model import ModelConfig
from hicodit.settings import GuidanceScales, SamplerConfig
from lia_x.codec import LiaXConfig
from rvq_codec import RVQCodecConfig
from talker_t2av.model import TalkerConfig
from talker_t2av.request import Sampling
from talker_t2av.speaker.encoder import VoiceEncoderConfig
from tests.engine.toy_task import CONFIG
from whisperx_vae.codec import WhisperXVAEConfig

SETTINGS = {TrainerConfig: CONFIG, SamplerConfig: {}, GuidanceScales: {}, Sampling: {}, Limits: {}}
SIZES = {  # of networks, as they stand in a release
    AVHubertConfig: {},
    LiaXConfig: {},
    ModelConfig: {},
    ReleasedEncoderConfig: {},
    RVQCodecConfig: {},
    TalkerConfig: {"llm": {}},
    TinyEncoderConfig: {},
    VoiceEncoderConfig: {},
    WhisperXVAEConfig: {},
}


def beyond(low, high) -> list:
    """Values out of bounds."""
    step = 1 if isinstance(low, int) else max(abs(high), 1e-6) * 0.01
    return [low - step, high + step, 10**30, -(10**30), math.nan, math.inf, -math.inf, "1", True, [[]]]


def wrapped(field: dataclasses.Field, value):
    """The value as this field takes it: several in a tuple."""
    return (2, value) if isinstance(field.default, tuple) else value


CASES = [
    (
        f"{kind.__name__}.{field.name}={value}",
        partial(lambda _, k, v: k(**v), k=kind, v={**given, field.name: wrapped(field, value)}),
        rf"{field.name}=.* must be a",
    )
    for kind, given in (SETTINGS | SIZES).items()
    for field in dataclasses.fields(kind)
    if field.metadata.get("bounds")
    for value in beyond(*field.metadata["bounds"])
]
CASES += [
    ("betas: three", lambda _: TrainerConfig(**{**CONFIG, "betas": (0.1, 0.1, 0.1)}), "betas=.* must be two numbers"),
    ("a switch of text", lambda _: ModelConfig(hierarchical="no"), "hierarchical=no must be true or false"),
    ("a list for a number", lambda _: ModelConfig(drop_all=[]), "drop_all=.. must be a number from 0.0 to 1.0"),
    ("seed: none", lambda _: require_range("seed", None, 0, 1), "seed=None must be a whole number from 0 to 1"),
]
