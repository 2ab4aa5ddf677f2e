"""Records of benchmarks, evaluations and trials: one dated JSON file per measurement."""

from __future__ import annotations

import math
import os
import platform
import re
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from engine.files import CHECKOUT, write_json

RESULTS = CHECKOUT / "benchmarks" / "results"


def portable(value: Any) -> Any:
    """Convert `value` to valid JSON without absolute paths.

    Absolute paths in strings are reduced to their last component. NaN and infinity become None, as JSON supports
    neither.
    """
    if isinstance(value, dict):
        return {key: portable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [portable(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        value = str(value)
    # A slash after a name, another slash, or the colon of a URL's scheme belongs to a relative path or a URL.
    return re.sub(r"(?<![\w/.-])(?<!:(?=//))/(?:[\w.-]+/)+(?=[\w.])", "", value) if isinstance(value, str) else value


def write_record(folder: Path, name: str, what: str, results: Any, device: str = "cpu", **about: Any) -> Path:
    """Write a `record` to FOLDER/DATE-NAME.json and return its path."""
    path = dated(folder, f"{name}.json")
    write_json(path, portable(record(what, results, device, **about)))
    return path


def dated(folder: Path, name: str) -> Path:
    """Return the path FOLDER/DATE-NAME with today's date."""
    return folder / f"{date.today().isoformat()}-{name}"


def record(what: str, results: Any, device: str = "cpu", **about: Any) -> dict[str, Any]:
    """Return the record of a measurement: its name `what`, details `about` it, its `origin`, and the results."""
    return {"what": what, **about, **origin(device), "results": results}


def origin(device: str = "cpu") -> dict[str, Any]:
    """Return date, command line, hardware and software versions of this process."""
    cuda = device.startswith("cuda")
    processor = platform.processor() or platform.machine()
    module = getattr(sys.modules["__main__"], "__spec__", None)  # `python -m NAME` puts the file into argv
    named = module is not None and module.origin == sys.argv[0]
    program = ["-m", module.name.removesuffix(".__main__")] if named else sys.argv[:1]
    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", *program, *sys.argv[1:]]),
        "hardware": {
            "device": torch.cuda.get_device_name(device) if cuda else processor,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average_5_min": round(os.getloadavg()[1], 2),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
