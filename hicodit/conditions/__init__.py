"""Conditions of the score network: their types, and the encoders that compute them from face images.

To add condition encoders, write two classes, add them to `ENCODERS`, and describe their settings in
configs/task/encoders/NAME.yaml:

- a config, a `Group` with `kind`, `lip_dim`, `face_dim`, `mouth_size`, `face_size`, `picture_every` and the methods
  `crop_mouth` and `crop_faces`, as `hicodit.conditions.encoders.TinyEncoderConfig`;
- a class that is constructed from it, with `config`, `learns` and the three encoders `lip`, `identity` and
  `expression`, as `hicodit.conditions.encoders.ConditionEncoders`, the base class of trained encoders, whose docstring
  states what the three receive and return.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from engine.instantiate import target
from engine.settings import make, require_choice
from hicodit.conditions.types import EXPRESSIONS, Conditions

if TYPE_CHECKING:
    from hicodit.conditions.encoders import ConditionEncoders, TinyEncoderConfig
    from hicodit.conditions.upstream import UpstreamEncoderConfig, UpstreamEncoders

__all__ = [
    "ENCODERS",
    "EXPRESSIONS",
    "Conditions",
    "EncoderConfig",
    "encoder_config",
    "encoders_learn",
    "make_encoders",
]

EncoderConfig: TypeAlias = "TinyEncoderConfig | UpstreamEncoderConfig"

# Config and encoders of each `kind` in configs/task/encoders/*.yaml. A module is imported when its kind is used.
ENCODERS = {
    "tiny": ("hicodit.conditions.encoders.TinyEncoderConfig", "hicodit.conditions.encoders.ConditionEncoders"),
    "upstream": ("hicodit.conditions.upstream.UpstreamEncoderConfig", "hicodit.conditions.upstream.UpstreamEncoders"),
}


def _class(kind: str, part: int) -> type:
    """Return the class of the config (0) or of the encoders (1) of a kind."""
    require_choice("encoders.kind", kind, ENCODERS)
    return target(ENCODERS[kind][part])


def encoders_learn(kind: str) -> bool:
    """Return whether encoders of this kind are trained with the model, from images.

    Those of other kinds have fixed weights, so that prepared shards contain their features instead of the images.
    """
    return _class(kind, 1).learns


def encoder_config(values: dict[str, Any]) -> EncoderConfig:
    """Create the encoder config from the `values` of a YAML file. `kind` is a key of `ENCODERS`, by default "tiny"."""
    kind = values.get("kind", "tiny")
    return make(_class(kind, 0), {**values, "kind": kind}, "encoders.")


def make_encoders(config: EncoderConfig) -> ConditionEncoders | UpstreamEncoders:
    """Create the lip, identity and expression encoders, with random weights or with those of the files in `config`."""
    return _class(config.kind, 1)(config)
