"""One measurement, one dated file in benchmarks/."""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

from engine.files import atomic_output


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
    path = folder / f"{today}-{name}.json"
    with atomic_output(path) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")
    return path
