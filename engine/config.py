"""Compose the YAML files of configs/ with command-line overrides; print help; report errors in one line.

Hydra composes. This module prints the help, names the nearest valid key for a mistyped one, and checks types. There are
no Hydra output folders and no change of directory. A setting's sentence in `--help` is that of its dataclass field,
else the comment beside its key in YAML; the first comment of a group's file describes that choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import Field, dataclass, field, fields
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.errors import UserError
from engine.settings import KINDS, NEEDED, check_value, hints_of, is_a, kind_of, make, nearest, require_choice

PACKAGES = ("engine", "corpora", "hicodit", "talker_t2av", "rvq_codec", "whisperx_vae", "lia_x", "tests")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
HELP_WORDS = ("--help", "-h", "--cfg", "job")


class MissingChoice(UserError):
    """A recipe leaves the choice of `group` to the user, and none was given."""

    def __init__(self, group: str, options: Sequence[str]) -> None:
        super().__init__(f"this recipe needs {group}=NAME; there are: {', '.join(options)}")
        self.group = group


def load(config_name: str, argv: Sequence[str], help_text: str) -> DictConfig:
    """Compose `configs/{config_name}.yaml` with the overrides in `argv` (`key=value`, `group=choice`).

    `--help` prints help and ends the program; `--cfg` prints the composed config and does so too. A key `name` that
    is `???` takes the name of the chosen `experiment`.

    Args:
        help_text: what the program does, then a line `Examples:` and examples. Overrides and choices go in between.
    """
    composed = _compose(config_name, [word for word in argv if word not in HELP_WORDS])
    config, choices = composed.config, composed.choices
    if "--help" in argv or "-h" in argv:
        print(_help(config_name, help_text, composed))
        raise SystemExit(0)
    if "--cfg" in argv:
        print(OmegaConf.to_yaml(config), end="")
        raise SystemExit(0)
    missing = [key for key, value in _walk(config) if value == "???"]
    if missing and "experiment" in choices and not choices["experiment"]:
        raise UserError(f"choose a recipe with experiment=NAME; there are: {', '.join(_options('experiment'))}")
    if missing:
        raise UserError(f"missing: {' '.join(f'{key}=...' for key in sorted(missing))} (see --help)")
    with _errors_in_one_line():
        values = plain(config)
    _check_targets(values)
    for key, schema in composed.schemas.items():
        node = reduce(lambda node, name: node[name], key.split(".") if key else (), values)
        make(schema, {name: value for name, value in node.items() if name != "_target_"}, f"{key}." if key else "")
    return config


def compose(config_name: str, words: Sequence[str]) -> DictConfig:
    """Compose as `load` does, for programs that need some values only.

    Mandatory values may be missing. Where a recipe leaves the choice of data to the user, it is `shards`.
    """
    try:
        return _compose(config_name, words).config
    except MissingChoice as missing:
        if missing.group != "data":
            raise
        return _compose(config_name, [*words, "data=shards"]).config


def read_preset(group: str, name: str) -> dict[str, dict[str, Any]]:
    """Return the settings of configs/GROUP/NAME.yaml."""
    require_choice(group, name, _options(group))
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{name}.yaml")) or {}


def build(node: Any, **extra: Any) -> Any:
    """Call the `_target_` of a config node with its other keys as plain Python values, in which nodes with a `_target_`
    are built too, and with `extra`.
    """
    node = plain(node) if OmegaConf.is_config(node) else node
    if isinstance(node, list):
        return [build(part) for part in node]
    if not isinstance(node, dict):
        return node
    arguments = {name: build(part) for name, part in node.items() if name != "_target_"} | extra
    if "_target_" not in node:
        return arguments
    try:
        return target(node["_target_"])(**arguments)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise UserError(f"{node['_target_']}: {error}") from error


def target(name: Any) -> Callable[..., Any]:
    """Return the class or function of this repository that `_target_` names: `engine.release.torch.load` is none."""
    module, _, attribute = str(name).rpartition(".")
    member = None
    if module.partition(".")[0] in PACKAGES:
        try:
            member = getattr(import_module(module), attribute, None)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name):  # a package that the module needs is not installed
                raise
    if not callable(member) or (member.__module__, getattr(member, "__qualname__", "")) != (module, attribute):
        raise UserError(f"_target_={name} is not a class or function of {', '.join(PACKAGES[:-1])}")
    return member


def plain(config: DictConfig) -> dict[str, Any]:
    """Return a composed config as dictionaries, lists and values."""
    return OmegaConf.to_container(config, resolve=True)


def _check_targets(node: Any) -> None:
    """Refuse classes that do not exist or are not ours, also in values that the command line sets whole."""
    if isinstance(node, dict) and "_target_" in node:
        target(node["_target_"])
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _check_targets(child)


@dataclass
class Composed:
    """A composed config, the choice of each group, and the dataclasses that describe it.

    schemas: dataclass by the key of its node, "" for the whole. described: field and type by dotted key.
    """

    choices: dict[str, str | None]
    config: DictConfig = field(default_factory=OmegaConf.create)
    schemas: dict[str, type] = field(default_factory=dict)
    described: dict[str, tuple[Field, Any]] = field(default_factory=dict)


def _compose(config_name: str, words: Sequence[str]) -> Composed:
    groups, values = [], list(words)
    while True:  # an experiment may bring groups of its own, whose choices can be set as well
        try:
            base, choices = _hydra(config_name, groups)
        except MissingChoice as missing:  # a recipe leaves this group's choice to the user
            choices = {missing.group: None}
            if not any(_name(word) in choices for word in values):
                raise
        choosing = [word for word in values if _name(word) in choices]
        if not choosing:
            break
        for word in choosing:
            group, choice, options = _name(word), word.partition("=")[2], _options(_name(word))
            if not word.startswith("~") and choice not in (*options, "null", ""):
                raise UserError(f"{group}={choice} does not exist; {nearest(choice, options)}")
        groups += choosing
        values = [word for word in values if word not in choosing]
    early = [word for word in values if word[0] in "+~" or _name(word).endswith("_target_")]
    if early:  # these decide which settings there are
        base, choices = _hydra(config_name, groups + early)
    result = Composed(choices)
    config = result.config = OmegaConf.create(_complete(base, "", result))
    for word in values:
        if word not in early:
            _set(result, word)
    if OmegaConf.is_missing(config, "name") and choices.get("experiment"):
        config.name = choices["experiment"]
    OmegaConf.set_struct(config, True)
    return result


def _complete(node: dict[str, Any], key: str, composed: Composed, schema: type | None = None) -> dict[str, Any]:
    """Return the node of a dotted key with the defaults of its dataclass, if it has one, and so on inside of it.

    The dataclass is `schema` for a group of another one, else what `_schema_` names, or `Settings` of the class that
    `_target_` names. `composed` gets the dataclasses and their fields.
    """
    if schema is None:
        schema = target(node.pop("_schema_")) if "_schema_" in node else None
        if "_target_" in node:
            schema = getattr(target(node["_target_"]), "Settings", None)
        if schema is not None:
            composed.schemas[key] = schema
    inside, kinds, complete = f"{key}." if key else "", {}, {}
    for each in fields(schema) if schema else ():
        kind = kinds[each.name] = each.metadata.get("group")
        composed.described[f"{inside}{each.name}"] = each, dict if kind else hints_of(schema)[each.name]
        default = each.default if each.default_factory is NEEDED else each.default_factory()
        if kind and not each.metadata["unset"]:
            default = {}
        value = node.get(each.name, "???" if default is NEEDED else default)
        complete[each.name] = default | value if kind and isinstance(value, dict) else value
    complete |= {name: value for name, value in node.items() if name not in complete}
    for name, value in complete.items():
        if isinstance(value, dict):
            complete[name] = _complete(value, f"{inside}{name}", composed, kinds.get(name))
    return complete


def _hydra(config_name: str, overrides: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    with _errors_in_one_line(), hydra.initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        config = hydra.compose(config_name, overrides=overrides, return_hydra_config=True)
    choices = {key: choice for key, choice in config.hydra.runtime.choices.items() if not key.startswith("hydra/")}
    values = OmegaConf.to_container(config, resolve=False)
    del values["hydra"]
    return values, choices


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        if missing := re.match(r"You must specify '([^']+)'", str(error)):
            raise MissingChoice(missing[1], _options(missing[1])) from error
        line = " ".join(str(error).split("\nset HYDRA_FULL_ERROR")[0].split())
        raise UserError(f"configuration: {line}") from error


def _name(word: str) -> str:
    """Return the key or group of an override, without the +, ++ or ~ in front."""
    key, equals, _ = word.partition("=")
    if not equals and not key.startswith("~"):
        raise UserError(f"unknown argument {word!r}: settings are written key=value; --help lists them")
    return key.lstrip("+~")


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group.partition("@")[0]).glob("*.yaml"))


def _set(composed: Composed, word: str) -> None:
    """Apply `key=value`; the key must exist and the value be of the type of its field, else of its default."""
    config, (key, _, text) = composed.config, word.partition("=")
    defaults = dict(_walk(config))
    if key not in defaults:
        raise UserError(f"unknown setting {key!r}; {nearest(key, [*defaults, *composed.choices])}")
    if text in ("", "''", '""'):
        raise UserError(f"{key}= is empty: give a value, or leave it out")
    field, hint = composed.described.get(key, (None, Any))
    kind = kind_of(hint)[0] if field else _kind_of_default(config, key, defaults[key])
    is_text = kind is str and text != "null" and not re.match(r"['\"]|.*\$\{", text)
    value = text
    if not is_text:  # a number, list, dict or text; paths with commas are texts
        with suppress(HydraException):
            parsed = OverridesParser.create().parse_override(word)
            value = text if parsed.is_sweep_override() else parsed.value()
    if not (isinstance(value, str) and "${" in value):
        if field:
            check_value(key, value, hint, field.metadata)
        elif kind is not None and value is not None and not is_a(value, kind):
            raise UserError(f"{key}={text} must be {KINDS[kind]} (default: {_printed(defaults[key])})")
    with _errors_in_one_line():
        OmegaConf.update(config, key, value, merge=True)


def _kind_of_default(config: DictConfig, key: str, default: Any) -> type | None:
    """Return the one of `KINDS` that a default is, or stands for if it is interpolated; None: any will do."""
    if isinstance(default, str) and "${" in default:
        try:
            default = OmegaConf.select(config, key, default=default)
        except OmegaConfBaseException:
            return str
        default = plain(default) if OmegaConf.is_config(default) else default
    return None if default in (None, "???") else type(default)


def _walk(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, default) of every node; `???` where mandatory, the text where interpolated."""
    nodes = OmegaConf.to_container(config, resolve=False) if isinstance(config, DictConfig) else config
    for key, value in nodes.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")


# --- help ---


def _help(name: str, text: str, composed: Composed) -> str:
    about, _, examples = text.partition("Examples:")
    sentences = {key: field.metadata.get("about", "") for key, (field, _) in composed.described.items()}
    for group, choice in {"": name, **composed.choices}.items():
        if not choice:
            continue
        folder, _, package = group.partition("@")
        package, path = package or folder.replace("/", "."), CONFIGS / folder / f"{choice}.yaml"
        prefix = "" if "@package _global_" in path.read_text() or not package else f"{package}."
        sentences |= {f"{prefix}{key}": sentence for key, sentence in _comments(path)}
    rows = [(key, _printed(value), sentences[key]) for key, value in _walk(composed.config) if sentences.get(key)]
    width = max((len(row[0]) for row in rows), default=0)
    default_width = min(24, max((len(row[1]) for row in rows), default=0))
    lines = [about.strip(), "", "Settings, as key=value (default):"]
    lines += [f"  {key:<{width}}  {default:<{default_width}}  {sentence}" for key, default, sentence in rows]
    for group, choice in composed.choices.items():
        lines += ["", f"{group}=..." + (f" ({choice})" if choice else "") + ":"]
        options = _options(group)
        width = max(map(len, options), default=0)
        headlines = [_headline(CONFIGS / group.partition("@")[0] / f"{option}.yaml") for option in options]
        lines += [f"  {option:<{width}}  {headline}".rstrip() for option, headline in zip(options, headlines)]
    lines += ["", "  --help         this text; after an experiment=NAME with that recipe's defaults"]
    lines += ["  --cfg          the whole composed config, as YAML"]
    if examples:
        lines += ["", "Examples:", *(f"  {line.strip()}" for line in examples.strip().splitlines())]
    return "\n".join(lines)


def _comments(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, comment) of a YAML file's lines, after those of the files that it is based on."""
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
    """Return the first comment line of a YAML file that is not an `@package` line."""
    lines = path.read_text().splitlines()
    return next((line.lstrip("# ").strip() for line in lines if line[:1] == "#" and "@package" not in line), "")


def _printed(value: Any) -> str:
    if value == "???":
        return "needed"
    if isinstance(value, dict):
        return ""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")
