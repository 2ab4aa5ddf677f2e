"""One measurement, one dated file in benchmarks/."""

from __future__ import annotations

import json
import platform
import re
from datetime import date
from pathlib import Path
from typing import Any

import torch

from engine.files import atomic_output


def portable(value: Any) -> Any:
    """Texts in `value` with the last names of absolute paths only: the others are of the machine that measured."""
    if isinstance(value, dict):
        return {key: portable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [portable(part) for part in value]
    # A slash after a name or another slash is of a relative path or of an address.
    return re.sub(r"(?<![\w/.:-])/(?:[\w.-]+/)+(?=[\w.])", "", value) if isinstance(value, str) else value


def write_record(folder: Path, name: str, what: str, hardware: dict[str, Any], results: Any, **about: Any) -> Path:
    """Write FOLDER/DATE-NAME.json: what was measured, on what, `about` (arguments, settings); gives its path."""
    today = date.today().isoformat()
    record = {
        "date": today,
        "what": what,
        **about,
        "hardware": hardware,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "results": results,
    }
    record = portable(record)
    path = folder / f"{today}-{name}.json"
    with atomic_output(path) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")
    return path
