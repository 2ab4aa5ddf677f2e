"""Names, JSON and YAML that come from elsewhere: a download, a server, a folder of another person.

Nothing read here can name a file outside the folder it belongs to, run code, or grow without bound.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from engine.errors import UserError

MAX_NAME = 200  # bytes of a file name without its suffix; file systems take 255
MAX_TEXT = 2**28  # bytes of a list of jobs, clips or files
MAX_YAML = 2**20  # bytes of a configuration; the largest bundled one has 6,000
MAX_SIZE = 2**20  # of a whole number in a configuration: a width, a count of layers or words
MAX_DEPTH = 32  # of lists and mappings in one another
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OPEN, _CLOSE = (yaml.SequenceStartEvent, yaml.MappingStartEvent), (yaml.SequenceEndEvent, yaml.MappingEndEvent)


def safe_name(name: Any, what: str, folders: bool = False) -> str:
    """`name`, which stands for a file inside some folder and for nothing else.

    Args:
        what: where the name comes from, for the error.
        folders: whether it may be a path down into subfolders, as in `speaker/clip`.

    Raises:
        UserError: it is no text, empty, too long, hidden (`.x`), absolute, or has `..`, a backslash or a control
            character.
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


def read_lines(path: str | Path, what: Any) -> list[str]:
    """The lines of a text file in UTF-8.

    Raises:
        UserError: `what` (a setting and the file) cannot be read, is no text, or has more than `MAX_TEXT` bytes.
    """
    try:
        with open(path, "rb") as file:  # of a device or a pipe the size is not known before
            content = file.read(MAX_TEXT + 1)
        if len(content) > MAX_TEXT:
            raise UserError(f"{what} has more than {MAX_TEXT:,} bytes: divide it")
        return content.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def parse_json(text: str | bytes, what: Any) -> Any:
    """The value of a JSON text.

    Raises:
        UserError: `what` (a file, a line) is no JSON, is nested too deep, or holds a null character, which no file
            name and no spoken text can have.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        if "\\u0000" in text:
            raise ValueError("it holds a null character")
        return json.loads(text.removeprefix("\ufeff"))
    except RecursionError:
        raise UserError(f"{what} cannot be read as JSON: it is nested too deep") from None
    except ValueError as error:
        raise UserError(f"{what} cannot be read as JSON ({error})") from error


def check_numbers(value: Any, where: Any, key: str = "") -> None:
    """
    Raises:
        UserError: a number in the plain containers `value` is not finite, or a whole number is below 0 or above
            `MAX_SIZE`. `where` and `key` tell where it stands.
    """
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_numbers(item, where, f"{key}.{name}" if key else str(name))
    elif isinstance(value, int) and not 0 <= value <= MAX_SIZE:
        raise UserError(f"{where}: {key}={str(value)[:40]} must be from 0 to {MAX_SIZE:,}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {key}={value} must be a finite number")


def read_yaml(path: Path) -> Any:
    """The plain containers of a YAML file. References such as ${oc.env:HOME} stay text: they are not resolved.

    Raises:
        UserError: it cannot be read as YAML, is too large, nested too deep, or uses aliases, by which a small file can
            stand for gigabytes.
    """
    try:
        if path.stat().st_size > MAX_YAML:
            raise ValueError(f"it has more than {MAX_YAML:,} bytes")
        text, depth = path.read_text(encoding="utf-8"), 0
        for event in yaml.parse(text, _YAML):
            depth += isinstance(event, _OPEN) - isinstance(event, _CLOSE)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it uses aliases")
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except Exception as error:  # yaml and omegaconf raise a dozen types for a damaged file
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
