"""Argument parsers of scripts and benchmarks: help with defaults, and one-line error messages."""

from __future__ import annotations

import argparse
import math
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import UserError
from engine.files import report_os_errors


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions, and adds defaults to the help of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default is False or default in (None, "", argparse.SUPPRESS) or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that raises `UserError` for invalid arguments, and whose help shows defaults."""

    def __init__(self, description: str, prog: str | None = None) -> None:
        super().__init__(prog, description=description, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` with argparse's message, which starts with the name of the option and its value.

        For example, `argument --clips: -1 must be 1 or more` becomes `--clips -1 must be 1 or more`.
        """
        raise UserError(re.sub(r"^argument (.*?): ", r"\1 ", message))


def within(least: float, most: float = math.inf, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """Return an argument `type` for numbers from `least` to `most`, for `ArgumentParser.add_argument`."""

    def read(word: str) -> Any:
        value = kind(word)
        if not least <= value <= most:
            bounds = f"{least} or more" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{word} must be {bounds}")
        return value

    read.__name__ = kind.__name__
    return read


def names(text: str) -> list[str]:
    """Return the names in a list such as "s1, s3". This is an argument `type`."""
    return [name.strip() for name in text.split(",") if name.strip()]


def existing_folder(word: str) -> Path:
    """Return the path of a folder, which must exist. This is an argument `type`."""
    if not Path(word).is_dir():
        raise argparse.ArgumentTypeError(f"{word} is not a folder")
    return Path(word)


def check_port(host: str, port: int) -> None:
    """Check that a server can listen on a port, before models are loaded.

    Raises:
        UserError: If the port is in use, or the host is not an address of this machine.
    """
    with report_os_errors(f"cannot listen on {host}, port {port}", ": choose another --host or --port"):
        try:
            family = socket.getaddrinfo(host, port)[0][0]
        except UnicodeError as error:
            raise UserError(f"--host {host} is not the name of a host") from error
        socket.create_server((host, port), family=family).close()
