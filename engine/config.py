"""Composition of configurations: Hydra merges the YAML files of configs/, dataclasses and overrides.

`configs/NAME.yaml` names its dataclass, an entry of `SCHEMAS`, as `NAME_schema` in its defaults list. Programs are
`@hydra.main` functions (see `engine.program`). `compose` does the same from Python.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from engine.errors import UserError
from engine.files import CHECKOUT
from engine.instantiate import check_targets, target
from engine.settings import KINDS, hints_of, kind_of, nearest, require_choice

CONFIGS = CHECKOUT / "configs"
SCHEMAS = {  # dataclass of each program's settings, imported only by the program that needs it
    "train": "engine.training.settings.TrainConfig",
    "infer": "hicodit.settings.InferConfig",
    "infer_talker": "talker_t2av.settings.InferConfig",
    "prepare": "corpora.preparation.settings.PrepareConfig",
    "evaluate": "engine.evaluation.settings.EvaluateConfig",
}


def compose(config_name: str, words: Sequence[str]) -> DictConfig:
    """Compose `configs/{config_name}.yaml` with overrides as the program does, but allow missing mandatory values.

    Args:
        words: overrides in Hydra's syntax, such as `experiment=hicodit_synthetic` or `trainer.lr=1e-3`.

    Raises:
        UserError: If an override names an unknown setting or option, or its value has the wrong type.
    """
    register(config_name)
    with explained(config_name, words):
        return _compose(config_name, prepared(config_name, words))


def load(config_name: str, words: Sequence[str]) -> DictConfig:
    """Compose a configuration and `check` it."""
    config = compose(config_name, words)
    check(config)
    return config


def check(config: DictConfig) -> None:
    """Check a composed configuration before any work begins.

    All mandatory values must be set, every `_target_` must name a class of this repository, and all values must satisfy
    the bounds and choices of the dataclasses.

    Raises:
        UserError: If a condition is violated.
    """
    missing = [key for key, value in walk(config) if value == "???"]
    if "task" in missing:
        raise UserError(f"choose a recipe with experiment=NAME; available: {', '.join(options('experiment'))}")
    if missing:
        raise UserError(f"missing: {' '.join(f'{key}=...' for key in sorted(missing))} (see --help)")
    with explained():
        check_targets(plain(config))
        OmegaConf.to_object(config)  # builds the dataclasses, whose __post_init__ checks the values


def plain(config: DictConfig) -> dict[str, Any]:
    """Convert a composed config to dictionaries, lists and plain values."""
    return OmegaConf.to_container(config, resolve=True)


def read_preset(group: str, name: str) -> dict[str, dict[str, Any]]:
    """Return the settings of configs/GROUP/NAME.yaml."""
    require_choice(group, name, options(group))
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{name}.yaml")) or {}


def options(group: str) -> list[str]:
    """Return the names of the files in configs/GROUP, such as those of the recipes for `experiment`."""
    return sorted(path.stem for path in (CONFIGS / group.partition("@")[0]).glob("*.yaml"))


def prepared(config_name: str, words: Sequence[str], sweep: bool = False) -> list[str]:
    """Quote overrides so that Hydra's grammar parses them as intended.

    The value of a text setting, such as a sentence or a file name with commas, quotes or brackets, is quoted where
    Hydra would reject or misread it. All other overrides are unchanged.

    Args:
        sweep: with `-m`, where commas separate the values of a sweep.

    Raises:
        UserError: If an argument is not an override, has an empty value, or removes a setting that has a dataclass.
    """
    return [_prepared_word(config_name, word, sweep) for word in words]


def _prepared_word(config_name: str, word: str, sweep: bool) -> str:
    key, equals, text = word.partition("=")
    name = key.lstrip("+~")
    field = find_field(config_name, name)
    if key.startswith("~"):
        if field is not None:
            raise UserError(f"{word}: {name} has a default and cannot be removed: set another value")
        return word
    groups = _groups()
    is_added = key.startswith("+") and name not in groups and not name.startswith("hydra.")
    if is_added and field is None and find_schema(config_name, name.rpartition(".")[0]):
        raise UserError(f"unknown setting {name!r}; {nearest(name, [*_keys(config_name, []), *groups])}")
    if not equals:
        raise UserError(f"unknown argument {word!r}: settings are written key=value; --help lists them")
    if text in ("", "''", '""'):
        raise UserError(f"{key}= is empty: set a value, or omit it")
    parsed = _parsed(word)
    value = None if parsed is None or parsed.is_sweep_override() else parsed.value()
    names = value if isinstance(value, list) else [value]
    fits_group = (value is None and text != "null") or all(isinstance(part, str | dict) for part in names)
    if name in groups and not fits_group:
        raise UserError(f"{word} does not exist; {nearest(text, options(name))}")
    if any(group.startswith(f"{name}/") for group in groups) and not fits_group:
        raise UserError(f"{word} would replace all settings of {name}: set {name}.KEY=VALUE")
    if key == name and _is_mapping(config_name, name):
        key = f"++{name}"  # names of systems, splits and figures are user-defined
    return f"{key}={quoted(text) if _needs_quotes(text, parsed, field, sweep) else text}"


def _needs_quotes(text: str, parsed: Override | None, field: tuple[dataclasses.Field, Any] | None, sweep: bool) -> bool:
    """Return whether Hydra would reject or misread a text.

    Args:
        text: the value of an override.
        parsed: the override as parsed by Hydra; None: it cannot be parsed.
        field: dataclass field and type of the setting. None: no dataclass has it.
    """
    is_text = field is not None and kind_of(field[1])[0] is str
    if text == "null" or "${" in text or (field is not None and not is_text):
        return False
    if parsed is None:
        return True
    if not is_text or (sweep and parsed.is_sweep_override()):
        return False
    is_quoted = text[0] in "'\"" and text[-1] == text[0]
    is_unchanged = not parsed.is_sweep_override() and parsed.value() == text
    return not is_quoted and not is_unchanged


def _is_mapping(config_name: str, name: str) -> bool:
    """Return whether a setting is a mapping with arbitrary keys, or an entry of one."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        found = find_field(config_name, ".".join(parts[:count]))
        if found and "group" not in found[0].metadata and kind_of(found[1])[0] is dict:
            return True
    return False


def quoted(text: str) -> str:
    """Quote text with the single quotes of Hydra's grammar."""
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", r"\'")
    return f"'{escaped}'"


def _parsed(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    running = GlobalHydra.instance().hydra  # Hydra's state of the program, if this is called within one
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            return hydra.compose(config_name, overrides=overrides)
    finally:
        GlobalHydra.instance().hydra = running


# --- dataclasses: types, defaults, bounds and descriptions of the settings ---


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


# --- mistakes in one line ---


@contextmanager
def explained(
    config_name: str = "", words: Sequence[str] = (), others: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Convert errors of Hydra and OmegaConf to a one-line `UserError` that suggests the nearest valid name.

    Args:
        config_name: name of the composed configuration, in which valid names are looked up.
        words: its overrides from the command line.
        others: other configurations of the program, and the word that selects each.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explanation(error, config_name, words, others or {})) from error


def _explanation(error: Exception, config_name: str, words: Sequence[str], others: Mapping[str, str]) -> str:
    text = str(error)
    cause = error.__cause__
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override[:80]} cannot be read: quote names and values that contain characters other than letters"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group or 'configuration'}={choice} does not exist; {nearest(choice, error.options or [])}"
    if match := re.match(r"(?:Error merging override ([^\n]+)|Could not override '([^']+)')", text):
        key, _, value = (match[1] or match[2]).partition("=")
        key = key.lstrip("+~")
        if isinstance(cause, ValidationError):
            field = find_field(config_name, key)
            kind = kind_of(field[1])[0] if field else None
            reason = f"must be {KINDS[kind]}" if kind else " ".join(str(cause).partition("\n")[0].split())
            return f"{key}={value[:40]} {reason}"
        keys = _keys(config_name, words)
        if key in keys:
            return f"{key} has no such keys by default: write ++{key}=... to add them"
        for other, choice in others.items():
            register(other)
            if key in _keys(other, []):
                return f"{key} is a setting of {choice}, which the command line does not select"
        known = [name for name in (*keys, *_groups()) if name != key]  # a group of another program
        return f"unknown setting {key!r}; {nearest(key, known)}"
    lines = [text.split("\nset HYDRA_FULL_ERROR")[0]]
    if isinstance(cause, OmegaConfBaseException):
        lines.append(str(cause))
    return f"configuration: {' '.join(' '.join(lines).split())}"


def _keys(config_name: str, words: Sequence[str]) -> list[str]:
    """Return the dotted keys of all settings, given the choices of config groups among `words`."""
    choices = [word for word in words if word.partition("=")[0].partition("@")[0] in _groups()]
    try:
        config = _compose(config_name, choices)
    except HydraException:
        config = _compose(config_name, [])
    return [key for key, _ in walk(config)]


def _groups() -> list[str]:
    return sorted({str(path.parent.relative_to(CONFIGS)) for path in CONFIGS.glob("*/**/*.yaml")})


def walk(config: DictConfig | ListConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every node. Missing values are `???`, and interpolations are returned as text."""
    nodes = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    for key, value in nodes.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{key}.")
