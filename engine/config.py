"""Composing the YAML files of configs/ with what was typed, with `--help` and errors for people.

Hydra composes; this module gives help that reads like help, finds the nearest valid name for a mistyped one, and checks
types against the defaults. There are no Hydra output folders and no change of directory.

YAML comments are the documentation: the comment beside a key is its meaning in `--help`, the first comment of a group's
file is the description of that choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.errors import UserError
from engine.settings import nearest

PACKAGES = ("engine", "corpora", "hicodit", "talker_t2av", "rvq_codec", "whisperx_vae", "lia_x", "tests")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
HELP_WORDS = ("--help", "-h", "--cfg", "job")


class MissingChoice(UserError):
    """A recipe leaves the choice of `group` to the user, and none was given."""

    def __init__(self, group: str, options: Sequence[str]) -> None:
        super().__init__(f"this recipe needs {group}=NAME; there are: {', '.join(options)}")
        self.group = group


def load(config_name: str, argv: Sequence[str], help_text: str, configs: Path = CONFIGS) -> DictConfig:
    """Compose `configs/{config_name}.yaml` with the overrides in `argv` (`key=value`, `group=choice`).

    `--help` prints help and ends the program; `--cfg` prints the composed config and does so too. A key `name` that
    is `???` takes the name of the chosen `experiment`.

    Args:
        help_text: what the program does, then a line `Examples:` and examples. Overrides and choices go in between.

    Raises:
        UserError: an unknown key or choice (the nearest are named), a wrong type, or a missing mandatory value.
    """
    flags = [word for word in argv if word in HELP_WORDS]
    wants_help, wants_config = "--help" in flags or "-h" in flags, "--cfg" in flags
    words = [word for word in argv if word not in HELP_WORDS]
    config, choices = _compose(config_name, words, configs)
    if wants_help:
        print(_help(config_name, help_text, config, choices, configs))
        raise SystemExit(0)
    if wants_config:
        print(OmegaConf.to_yaml(config), end="")
        raise SystemExit(0)
    _check_complete(config, choices, configs)
    return config


def compose(config_name: str, words: Sequence[str], configs: Path = CONFIGS) -> DictConfig:
    """As `load`, for programs that look at some values only: mandatory ones may be missing, and data that a recipe
    leaves to the user are `shards`."""
    try:
        return _compose(config_name, words, configs)[0]
    except MissingChoice as missing:
        if missing.group != "data":
            raise
        return _compose(config_name, [*words, "data=shards"], configs)[0]


def build(config: DictConfig, **extra: Any) -> Any:
    """Call the `_target_` of a config node with its other keys as plain Python values, and `extra`.

    Raises:
        UserError: as the target raised it, or because a target is none of ours or its arguments do not exist.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    _check_targets(plain)
    try:
        return hydra.utils.instantiate(plain, _convert_="all", **extra)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        if isinstance(error.__cause__, TypeError) and "argument" in str(error.__cause__):
            raise UserError(f"{config.get('_target_')}: {error.__cause__}") from error
        raise


def target(name: Any) -> Callable[..., Any]:
    """The class or function of this repository that `_target_` names: `engine.release.torch.load` is none.

    Raises:
        UserError: there is none of that name.
    """
    module, _, attribute = str(name).rpartition(".")
    found = None
    if module.partition(".")[0] in PACKAGES:
        try:
            found = getattr(import_module(module), attribute, None)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name):  # a package that the module needs is not installed
                raise
    if not callable(found) or (found.__module__, getattr(found, "__qualname__", "")) != (module, attribute):
        raise UserError(f"_target_={name} is not a class or function of {', '.join(PACKAGES[:-1])}")
    return found


def plain(config: DictConfig) -> dict[str, Any]:
    """Return a composed config as dictionaries, lists and values."""
    return OmegaConf.to_container(config, resolve=True)


def _check_targets(node: Any) -> None:
    if isinstance(node, dict) and "_target_" in node:
        target(node["_target_"])
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _check_targets(child)


def _compose(config_name: str, words: Sequence[str], configs: Path) -> tuple[DictConfig, dict[str, str]]:
    """(config, group -> choice). Groups are applied first, so that values are checked against what they brought."""
    groups, values = [], list(words)
    while True:  # an experiment may bring groups of its own, whose choices can be set as well
        try:
            base, choices = _hydra(config_name, groups, configs)
        except MissingChoice as missing:  # a recipe leaves this group's choice to the user
            choices = {missing.group: None}
            if not any(_name(word) in choices for word in values):
                raise
        found = [word for word in values if _name(word) in choices]
        if not found:
            break
        for word in found:
            _check_choice(word, configs)
        groups += found
        values = [word for word in values if word not in found]
    checked = [_check_value(word, base, [*choices]) for word in values]
    folders = [word for word in checked if (configs / _name(word)).is_dir() and word[0] not in "+~"]
    config, choices = _hydra(config_name, [*groups, *(word for word in checked if word not in folders)], configs)
    for word in folders:  # settings that share a folder's name, which Hydra would take for a choice from it
        override = _parse(word)
        assert override is not None
        OmegaConf.update(config, override.key_or_group, override.value())
    if OmegaConf.is_missing(config, "name") and choices.get("experiment"):
        config.name = choices["experiment"]
    return config, choices


def _hydra(config_name: str, overrides: list[str], configs: Path) -> tuple[DictConfig, dict[str, str]]:
    try:
        with hydra.initialize_config_dir(config_dir=str(configs), version_base="1.3"):
            config = hydra.compose(config_name, overrides=overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        if missing := re.match(r"You must specify '([^']+)'", str(error)):
            raise MissingChoice(missing[1], _options(missing[1], configs)) from error
        raise UserError(f"configuration: {_one_line(error)}") from error
    choices = {key: choice for key, choice in config.hydra.runtime.choices.items() if not key.startswith("hydra/")}
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    OmegaConf.set_struct(config, True)
    return config, choices


def _name(word: str) -> str:
    """The key or group of an override, without the +, ++ or ~ in front."""
    key, equals, _ = word.partition("=")
    if not equals and not key.startswith("~"):
        raise UserError(f"unknown argument {word!r}: settings are written key=value; --help lists them")
    return key.lstrip("+~")


def _options(group: str, configs: Path) -> list[str]:
    return sorted(path.stem for path in (configs / group.partition("@")[0]).glob("*.yaml"))


def _check_choice(word: str, configs: Path) -> None:
    key, _, choice = word.partition("=")
    group = _name(word)
    options = _options(group, configs)
    if key.startswith("~") or choice in options or choice in ("null", ""):
        return
    raise UserError(f"{group}={choice} does not exist; {nearest(choice, options)}")


def _check_value(word: str, base: DictConfig, groups: list[str]) -> str:
    """`word`, quoted for Hydra's grammar where it stands for a string; its key must exist and its type fit."""
    key, _, text = word.partition("=")
    if key.startswith(("+", "~")):  # adding and deleting is Hydra's business
        return word
    known = dict(_walk(base))
    if key not in known:
        raise UserError(f"unknown setting {key!r}; {nearest(key, [*known, *groups])}")
    default = known[key]
    if text in ("", "''", '""'):
        raise UserError(f"{key}= is empty: give a value, or leave it out")
    if isinstance(default, str) and "${" in default:
        default = _resolved(base, key, default)
    if isinstance(default, str) and default != "???" and text != "null" and not re.match(r"['\"]|.*\$\{", text):
        return f"{key}={_quoted(text)}"
    override = _parse(word) or _parse(f"{key}={_quoted(text)}")  # paths with commas, brackets or spaces are strings
    assert override is not None
    value = override.value()
    expected = _mismatch(default, value)
    if expected:
        raise UserError(f"{key}={text} is not {expected} (default: {_shown(default)})")
    return override.input_line


def _resolved(base: DictConfig, key: str, text: str) -> Any:
    """What an interpolated default stands for, so that the type it has counts; its text where that is not known yet."""
    try:
        value = OmegaConf.select(base, key)
    except OmegaConfBaseException:
        return text
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=False)
    return text if value is None else value


def _parse(word: str) -> Override | None:
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return None
    return None if override.is_sweep_override() or override.type != OverrideType.CHANGE else override


def _quoted(text: str) -> str:
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{trailing * chr(92)}'"


def _mismatch(default: Any, value: Any) -> str | None:
    """What `value` should have been, or None if it fits the default's type. `???` and null defaults take anything."""
    if value is None or default is None or default == "???" or (isinstance(value, str) and "${" in value):
        return None
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        return None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
    if isinstance(default, float):
        return None if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    if isinstance(default, list):
        return None if isinstance(value, list) else "a list, as in [1,2]"
    if isinstance(default, dict):
        return None if isinstance(value, dict) else "a group of settings; set the ones inside it"
    return None


def _walk(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, default) of every node; `???` where mandatory, the text where interpolated."""
    plain = OmegaConf.to_container(config, resolve=False) if isinstance(config, DictConfig) else config
    for key, value in plain.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")


def _check_complete(config: DictConfig, choices: dict[str, str], configs: Path) -> None:
    missing = [key for key, value in _walk(config) if value == "???"]
    if missing and "experiment" in choices and not choices["experiment"]:
        raise UserError(
            f"choose a recipe with experiment=NAME; there are: {', '.join(_options('experiment', configs))}"
        )
    if missing:
        raise UserError(f"missing: {' '.join(f'{key}=...' for key in sorted(missing))} (see --help)")
    try:
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\nset HYDRA_FULL_ERROR")[0].split())


# --- help ---


def _help(name: str, text: str, config: DictConfig, choices: dict[str, str], configs: Path) -> str:
    about, _, examples = text.partition("Examples:")
    values = dict(_walk(config))
    lines = [about.strip(), "", "Settings, as key=value (default):"]
    sources = [(configs / f"{name}.yaml", "")]
    for group, choice in choices.items():
        folder, _, package = group.partition("@")
        if choice:
            path = configs / folder / f"{choice}.yaml"
            is_global = "@package _global_" in path.read_text()  # as recipes are
            sources.append((path, "" if is_global else package or folder.replace("/", ".")))
    rows = []
    for path, prefix in sources:
        for key, meaning in _comments(path):
            full = f"{prefix}.{key}" if prefix else key
            if full in values:
                rows.append((full, _shown(values[full]), meaning))
    rows = list({row[0]: row for row in rows}.values())
    width = max((len(row[0]) for row in rows), default=0)
    shown = min(24, max((len(row[1]) for row in rows), default=0))
    lines += [f"  {key:<{width}}  {default:<{shown}}  {meaning}" for key, default, meaning in rows]
    for group, choice in choices.items():
        lines += ["", f"{group}=..." + (f" ({choice})" if choice else "") + ":"]
        options = _options(group, configs)
        width = max(map(len, options), default=0)
        lines += [
            f"  {option:<{width}}  {_headline(configs / group.partition('@')[0] / f'{option}.yaml')}".rstrip()
            for option in options
        ]
    lines += ["", "  --help         this text; after an experiment=NAME with that recipe's defaults"]
    lines += ["  --cfg          the whole composed config, as YAML"]
    if examples:
        lines += ["", "Examples:", *(f"  {line.strip()}" for line in examples.strip().splitlines())]
    return "\n".join(lines)


def _comments(path: Path) -> Iterator[tuple[str, str]]:
    """(dotted key, comment) of a YAML file's lines that have a comment, after those of the files it is based on."""
    text = path.read_text()
    for base in re.findall(r"^\s*-\s+(\w+)\s*$", text.partition("defaults:")[2], re.MULTILINE):
        if base != "_self_" and (path.parent / f"{base}.yaml").is_file():
            yield from _comments(path.parent / f"{base}.yaml")
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = re.match(r"^(\s*)([A-Za-z_]\w*):(.*)$", line)
        if not match:
            continue
        indent = len(match[1])
        while stack and stack[-1][0] >= indent:
            stack.pop()
        stack.append((indent, match[2]))
        comment = re.search(r"\s#\s*(.+)$", match[3])
        if comment:
            yield ".".join(name for _, name in stack), comment[1].strip()


def _headline(path: Path) -> str:
    """The first comment line of a YAML file that is not an `@package` line."""
    for line in path.read_text().splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""


def _shown(value: Any) -> str:
    if value == "???":
        return "needed"
    if isinstance(value, dict):
        return ""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")
