"""Validation of names, JSON and YAML from untrusted sources: downloads, servers, and folders of other users.

Data read here cannot refer to files outside of their folder, execute code, or grow without bound.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from engine.errors import UserError

MAX_NAME = 200  # maximum bytes of a file name without its suffix; file systems allow 255
MAX_FILE = 2**28  # maximum bytes of a JSON file, or of a list of jobs, clips or files
MAX_YAML = 2**20  # maximum bytes of a configuration; the largest bundled one has 6,000
MAX_SIZE = 2**20  # maximum integer in a configuration, such as a width or a number of layers
MAX_DEPTH = 32  # maximum nesting depth of lists and mappings
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OPEN = (yaml.SequenceStartEvent, yaml.MappingStartEvent)
_CLOSE = (yaml.SequenceEndEvent, yaml.MappingEndEvent)


def safe_name(name: Any, what: str, folders: bool = False) -> str:
    """Return `name` if it is a valid name of a file within a folder; otherwise raise UserError.

    Rejected names: not a string, empty, too long, hidden (`.x`), absolute, or with `..`, a backslash or a control
    character.

    Args:
        what: origin of the name, for the error message.
        folders: whether subfolders are allowed, as in `speaker/clip`.
    """
    parts = name.split("/") if isinstance(name, str) and folders else [name]
    for part in parts:
        if (
            not isinstance(part, str)
            or not part.isprintable()
            or not 0 < len(part.encode()) <= MAX_NAME
            or part.startswith(".")
            or set(part) & set("/\\")
        ):
            allowed = "a file name, or a path without `..`," if folders else "a file name without folders"
            raise UserError(
                f"{what} {str(name)[:80]!r} must be {allowed} of printable characters, not hidden, "
                f"{MAX_NAME} bytes at most"
            )
    return name


def read_text(path: str | Path, what: Any = None, limit: int = MAX_FILE) -> str:
    """Return the contents of a UTF-8 text file of at most `limit` bytes. `what` is its name in errors."""
    what = what or path
    try:
        with open(path, "rb") as file:  # devices and pipes have no size
            content = file.read(limit + 1)
        if len(content) > limit:
            raise UserError(f"{what} has more than {limit:,} bytes: split it")
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_lines(path: str | Path, what: Any = None) -> list[str]:
    """Return the lines of a text file, see `read_text`."""
    # Unlike `splitlines`, only at line feeds and carriage returns, as JSON and texts may contain other separators.
    return [line.removesuffix("\n") for line in io.StringIO(read_text(path, what), newline=None)]


def read_json_lines(path: str | Path, what: Any = None) -> list[tuple[str, Any]]:
    """Return (location, value) of each line of a JSON lines file. The location is used in errors."""
    places = [(f"{path}, line {number}", line) for number, line in enumerate(read_lines(path, what), 1) if line.strip()]
    return [(place, parse_json(line, place)) for place, line in places]


def read_json(path: str | Path, what: Any = None) -> Any:
    """Return the value of a JSON file, see `parse_json`."""
    return parse_json(read_text(path, what), what or path)


def parse_json(text: str | bytes, what: Any) -> Any:
    """Parse JSON text. `what` (a file, a line) is its name in errors.

    Null characters are rejected, as neither file names nor texts may contain them.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        if "\\u0000" in text:
            raise ValueError("it contains a null character")
        return json.loads(text.removeprefix("\ufeff"))
    except RecursionError:
        raise UserError(f"{what} cannot be read as JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{what} cannot be read as JSON ({error})") from error


def parse_object(text: str | bytes, what: Any, names: Collection[str], example: str) -> dict[str, Any]:
    """Parse a JSON object whose keys must be among `names`. `what` and `example` are used in errors."""
    value = parse_json(text, what)
    if not isinstance(value, dict):
        raise UserError(f"{what} must be a JSON object, as in {example}")
    if unknown := sorted(value.keys() - names):
        raise UserError(f"unknown setting {unknown[0][:40]!r}; available: {', '.join(sorted(names))}")
    return value


def check_numbers(value: Any, source: Any, key: str = "") -> None:
    """Raise UserError unless all floats in nested containers are finite and all integers are in 0..`MAX_SIZE`.

    `source` and `key` are the file and setting of the value, for errors.
    """
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_numbers(item, source, f"{key}.{name}" if key else str(name))
    elif isinstance(value, int) and not 0 <= value <= MAX_SIZE:
        raise UserError(f"{source}: {key}={str(value)[:40]} must be from 0 to {MAX_SIZE:,}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{source}: {key}={value} must be a finite number")


def read_yaml(path: Path) -> Any:
    """Parse a YAML file into plain containers. References such as ${oc.env:HOME} stay text and are not resolved.

    Aliases are rejected, as a small file could expand to gigabytes.
    """
    try:
        text = read_text(path, "it", MAX_YAML)
        depth = 0
        for event in yaml.parse(text, _YAML):
            depth += isinstance(event, _OPEN) - isinstance(event, _CLOSE)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it uses aliases")
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except Exception as error:  # yaml and omegaconf raise a dozen types for a damaged file
        raise UserError(f"{path} cannot be read as YAML: {error}") from error


def load_problem(error: BaseException) -> str:
    """Return the reason why torch.load failed as one line, without its advice to disable weights_only."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or contains more than tensors"
    return str(error).strip().partition("\n")[0] or type(error).__name__
