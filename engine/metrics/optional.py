"""Imports of the packages of the `eval` extra."""

from __future__ import annotations

import importlib
from types import ModuleType

from engine.errors import UserError


def need(module: str, package: str, extra: str = "eval") -> ModuleType:
    """Import `module`.

    Raises:
        UserError: it is not installed; the message names the package and the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this needs {package} ({error}): install it with  bash scripts/setup.sh {extra}") from error
