"""Models that a benchmark trains, each in a folder with its figures, so that a second run goes on where one ended."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import atomic_output

ROOT = Path(__file__).resolve().parents[1]


def make_once(folder: Path, settings: list[str], make: Callable[[], None]) -> None:
    """Call `make`, which puts a model into `folder`, unless it is there and made with these settings.

    What was measured of an older model there is deleted.
    """
    done = folder / "trained.json"
    if done.exists() and json.loads(done.read_text()) == settings:
        return
    make()
    done.write_text(json.dumps(settings))
    for old in folder.glob("figures-*.json"):
        old.unlink()


def measure_once(path: Path, measure: Callable[[], Any]) -> Any:
    """What the JSON file `path` holds; where it is missing, it is written with what `measure` gives."""
    if not path.exists():
        found = measure()
        with atomic_output(path) as partial:
            partial.write_text(json.dumps(found))
    return json.loads(path.read_text())


def train(folder: Path, settings: list[str]) -> None:
    """Run train.py to its last step, in the user's working folder: what the settings name lies there.

    Args:
        folder: of the run. settings: of train.py.

    Raises:
        UserError: the training failed.
    """
    never = ["trainer.checkpoint_every=1000000", "trainer.validate_every=1000000"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "training.log").open("a") as log:
        command = [sys.executable, str(ROOT / "train.py"), f"run={folder}", *never, *settings]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code != 0:
        raise UserError(f"the training of {folder.name} failed (exit {code}), see {folder / 'training.log'}")
