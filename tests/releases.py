"""A release of a task's present weights, without a run."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.training.export import card, write
from engine.training.task import Task


def write_release(task: Task, folder: Path, results: Mapping[str, float] | None = None) -> None:
    release = task.release_info()
    with TemporaryDirectory() as files:
        task.release_files(Path(files))
        write(folder, release, task.state_dict(), card(release, {}, results or {}), Path(files))
