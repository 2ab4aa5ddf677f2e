"""Conditions of the score network: their types, and the encoders that make them from pictures of a face."""

from __future__ import annotations

from typing import Any

from engine.errors import UserError
from hicodit.conditions.encoders import ConditionEncoders, TinyEncoderConfig
from hicodit.conditions.types import EXPRESSIONS, Conditions
from hicodit.conditions.upstream import UpstreamEncoderConfig, UpstreamEncoders

__all__ = ["EXPRESSIONS", "KINDS", "Conditions", "EncoderConfig", "Encoders", "encoder_config", "make_encoders"]

EncoderConfig = TinyEncoderConfig | UpstreamEncoderConfig
Encoders = ConditionEncoders | UpstreamEncoders
KINDS = {  # `kind` of configs/task/encoders/*.yaml -> its configuration, the encoders that it configures
    "tiny": (TinyEncoderConfig, ConditionEncoders),
    "upstream": (UpstreamEncoderConfig, UpstreamEncoders),
}


def encoder_config(values: dict[str, Any]) -> EncoderConfig:
    """Create the configuration from the `values` of a YAML file. `kind` is a name of `KINDS`, by default "tiny".

    Releases of before 2026-11-25 call the kind "upstream" "released".
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
    """Make lip, identity and expression encoder with random weights, or with those of the files that `config` names."""
    return KINDS[config.kind][1](config)
