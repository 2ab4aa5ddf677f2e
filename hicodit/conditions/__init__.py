"""Conditions of the score network: their types, and the encoders that compute them from face images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from engine.settings import make, require_choice
from hicodit.conditions.encoders import ConditionEncoders, TinyEncoderConfig
from hicodit.conditions.types import EXPRESSIONS, Conditions

if TYPE_CHECKING:
    from hicodit.conditions.upstream import UpstreamEncoderConfig, UpstreamEncoders

__all__ = ["EXPRESSIONS", "KINDS", "Conditions", "EncoderConfig", "encoder_config", "encoders_learn", "make_encoders"]

EncoderConfig: TypeAlias = "TinyEncoderConfig | UpstreamEncoderConfig"

KINDS = ("tiny", "upstream")  # `kind` of configs/task/encoders/*.yaml
RENAMED = {"released": "upstream"}  # in files from before 2026-11-25


def encoders_learn(kind: str) -> bool:
    """Return whether encoders of this kind are trained with the model, from images.

    Those of other kinds have fixed weights, so that prepared shards contain their features instead of the images.
    """
    kind = RENAMED.get(kind, kind)
    require_choice("encoders.kind", kind, KINDS)
    return kind == "tiny"


def encoder_config(values: dict[str, Any]) -> EncoderConfig:
    """Create the encoder config from the `values` of a YAML file. `kind` is one of `KINDS`, by default "tiny"."""
    kind = values.get("kind", "tiny")
    values = {**values, "kind": RENAMED.get(kind, kind)}
    if encoders_learn(kind):
        return make(TinyEncoderConfig, values, "encoders.")
    from hicodit.conditions.upstream import UpstreamEncoderConfig  # three large networks that few models use

    return make(UpstreamEncoderConfig, values, "encoders.")


def make_encoders(config: EncoderConfig) -> ConditionEncoders | UpstreamEncoders:
    """Create the lip, identity and expression encoders, with random weights or with those of the files in `config`."""
    if isinstance(config, TinyEncoderConfig):
        return ConditionEncoders(config)
    from hicodit.conditions.upstream import UpstreamEncoders

    return UpstreamEncoders(config)
