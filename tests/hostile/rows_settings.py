"""Rows of settings: every bounded field of every dataclass, one beyond each end, not a number, and of another type."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

from engine.bounds import require_range
from engine.training.task import TrainerConfig
from hicodit.guidance import GuidanceScales
from hicodit.samplers import SamplerConfig
from talker_t2av.request import Sampling
from tests.engine.toy_task import CONFIG

SETTINGS = {TrainerConfig: CONFIG, SamplerConfig: {}, GuidanceScales: {}, Sampling: {}}


def beyond(low, high) -> list:
    """Values out of bounds."""
    step = 1 if isinstance(low, int) else max(abs(high), 1e-6) * 0.01
    return [low - step, high + step, 10**30, -(10**30), math.nan, math.inf, -math.inf, "1", True, [[]]]


CASES = [
    (
        f"{kind.__name__}.{field.name}={value}",
        partial(lambda _, k, v: k(**v), k=kind, v={**given, field.name: value}),
        rf"{field.name}=.* must be a",
    )
    for kind, given in SETTINGS.items()
    for field in dataclasses.fields(kind)
    if "bounds" in field.metadata
    for value in beyond(*field.metadata["bounds"])
]
CASES += [
    ("betas: three", lambda _: TrainerConfig(**{**CONFIG, "betas": (0.1, 0.1, 0.1)}), "betas=.* must be two numbers"),
    ("seed: none", lambda _: require_range("seed", None, 0, 1), "seed=None must be a whole number from 0 to 1"),
]
