"""Conditions of the score network: their types, and the encoders that make them from pictures of a face."""

from __future__ import annotations

from typing import Any

from engine.errors import UserError
from hicodit.conditions.encoders import ConditionEncoders, TinyEncoderConfig
from hicodit.conditions.released import ReleasedEncoderConfig, ReleasedEncoders
from hicodit.conditions.types import EXPRESSIONS, Conditions

__all__ = ["EXPRESSIONS", "KINDS", "Conditions", "EncoderConfig", "Encoders", "encoder_config", "make_encoders"]

EncoderConfig = TinyEncoderConfig | ReleasedEncoderConfig
Encoders = ConditionEncoders | ReleasedEncoders
KINDS = {  # `kind` of configs/task/encoders/*.yaml -> its configuration, the encoders that it configures
    "tiny": (TinyEncoderConfig, ConditionEncoders),
    "released": (ReleasedEncoderConfig, ReleasedEncoders),
}


def encoder_config(values: dict[str, Any]) -> EncoderConfig:
    """Make the configuration from the `values` of a YAML file. `kind` is a name of `KINDS`, by default "tiny"."""
    kind = values.get("kind", "tiny")
    if kind not in KINDS:
        raise UserError(f"encoders.kind={kind} is unknown: choose {' or '.join(KINDS)}")
    try:
        return KINDS[kind][0](**values)
    except TypeError as error:
        raise UserError(f"encoders of kind {kind}: {error}") from error


def make_encoders(config: EncoderConfig) -> Encoders:
    """Make lip, identity and expression encoder with random weights, or with those of the files that `config` names."""
    return KINDS[config.kind][1](config)
