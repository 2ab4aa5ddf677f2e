"""Dataclass schemas of each program's settings: types, defaults, bounds and descriptions.

`configs/NAME.yaml` names its dataclass as `NAME_schema` in its defaults list. `register` stores it in Hydra's
ConfigStore. A dataclass is imported only by the program that needs it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from engine.instantiate import target
from engine.settings import hints_of

SCHEMAS = {
    "train": "engine.training.settings.TrainConfig",
    "infer": "hicodit.settings.InferConfig",
    "infer_talker": "talker_t2av.settings.InferConfig",
    "prepare": "corpora.preparation.settings.PrepareConfig",
    "evaluate": "engine.evaluation.settings.EvaluateConfig",
}


def register(config_name: str) -> None:
    """Store the dataclass of a program in Hydra's ConfigStore as `{config_name}_schema`."""
    if config_name not in SCHEMAS:
        return
    schema = OmegaConf.structured(target(SCHEMAS[config_name]))
    _allow_changes(schema)
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)


def find_schema(config_name: str, key: str = "") -> type | None:
    """Return the dataclass of the settings below a dotted key; "" is the whole configuration.

    Return None for `task`, `data`, `source` and `stages`, whose settings are the arguments of their `_target_` classes.
    """
    schema = target(SCHEMAS[config_name]) if config_name in SCHEMAS else None
    for name in key.split(".") if key else ():
        groups = {field.name: field.metadata.get("group") for field in dataclasses.fields(schema)} if schema else {}
        schema = groups.get(name)
    return schema


def find_field(config_name: str, key: str) -> tuple[dataclasses.Field, Any] | None:
    """Return the dataclass field and type of a setting such as `trainer.lr`, or None if no dataclass has it."""
    parent, _, name = key.rpartition(".")
    schema = find_schema(config_name, parent)
    for field in dataclasses.fields(schema) if schema else ():
        if field.name == name:
            return field, dict if "group" in field.metadata else hints_of(schema)[name]
    return None


def _allow_changes(node: DictConfig) -> None:
    """Remove the read-only flags that OmegaConf sets for frozen dataclasses, so that overrides can change values."""
    node._set_flag("readonly", None)
    for name in node:
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_missing() and not child._is_none():
            _allow_changes(child)
