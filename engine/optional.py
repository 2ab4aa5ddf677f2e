"""Imports of packages that only an extra installs: an error says which one."""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path
from types import ModuleType

from filelock import FileLock

from engine.errors import UserError


def require(module: str, package: str, extra: str = "eval") -> ModuleType:
    """Import `module`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this needs {package} ({error}): install it with  bash scripts/setup.sh {extra}") from error


def require_librosa() -> ModuleType:
    """Import librosa with those of its vectorised functions that are used here, one process at a time.

    They are compiled when they are imported for the first time after an installation, into a cache that two
    processes at once leave broken: every later import then ends in a segmentation fault (numba issue 10128).
    """
    librosa = require("librosa", "librosa")
    with FileLock(Path(tempfile.gettempdir()) / f"librosa-{os.getuid()}.lock"):
        _ = librosa.pyin, librosa.feature.melspectrogram  # librosa imports its modules as they are named
    return librosa
