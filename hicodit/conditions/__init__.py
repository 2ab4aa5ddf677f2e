"""Conditions of the score network: their types, and the encoders that compute them from face images."""

from __future__ import annotations

from typing import Any

from engine.errors import UserError
from hicodit.conditions.encoders import ConditionEncoders, TinyEncoderConfig
from hicodit.conditions.types import EXPRESSIONS, Conditions
from hicodit.conditions.upstream import UpstreamEncoderConfig, UpstreamEncoders

__all__ = ["EXPRESSIONS", "KINDS", "Conditions", "EncoderConfig", "Encoders", "encoder_config", "make_encoders"]

EncoderConfig = TinyEncoderConfig | UpstreamEncoderConfig
Encoders = ConditionEncoders | UpstreamEncoders
KINDS = {  # `kind` of configs/task/encoders/*.yaml maps to the config class and the encoder class
    "tiny": (TinyEncoderConfig, ConditionEncoders),
    "upstream": (UpstreamEncoderConfig, UpstreamEncoders),
}


def encoder_config(values: dict[str, Any]) -> EncoderConfig:
    """Create the encoder config from the `values` of a YAML file. `kind` is a key of `KINDS`, by default "tiny".

    Releases before 2026-11-25 use "released" for the kind "upstream".
    """
    kind = values.get("kind", "tiny")
    if kind == "released":
        kind = "upstream"
        values = {**values, "kind": kind}
    if kind not in KINDS:
        raise UserError(f"encoders.kind={kind} is unknown: choose {' or '.join(KINDS)}")
    try:
        return KINDS[kind][0](**values)
    except TypeError as error:
        raise UserError(f"encoders of kind {kind}: {error}") from error


def make_encoders(config: EncoderConfig) -> Encoders:
    """Create the lip, identity and expression encoders, with random weights or with those of the files in `config`."""
    return KINDS[config.kind][1](config)
