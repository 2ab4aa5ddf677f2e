"""Command lines of scripts and benchmarks: one style of help, and one line for a mistake."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import UserError


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions, and adds defaults to the help of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default is False or default in (None, "", argparse.SUPPRESS) or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Parses the words of a command that `about` describes; a mistake is a `UserError`."""

    def __init__(self, about: str, prog: str | None = None) -> None:
        super().__init__(prog, description=about, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError`, where `--clips -1: give 1 or more` stands for argparse's `argument --clips: -1: ...`."""
        raise UserError(re.sub(r"^argument (.*?): ", r"\1 ", message))


def within(least: float, most: float = math.inf, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """Return the `type` of an argument that is a number of a range."""

    def read(word: str) -> Any:
        value = kind(word)
        if not least <= value <= most:
            end = "or more" if most == math.inf else f"to {most}"
            raise argparse.ArgumentTypeError(f"{word}: give {least} {end}")
        return value

    read.__name__ = kind.__name__
    return read


def existing_folder(word: str) -> Path:
    """Read an argument that names a folder, which must exist; the `type` of such an argument."""
    if not Path(word).is_dir():
        raise argparse.ArgumentTypeError(f"{word} is not a folder")
    return Path(word)
