"""Output files appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.errors import UserError

SPACE = 500  # megabytes that a run needs at least


@contextmanager
def report_os_errors(what: str, advice: str = "") -> Iterator[None]:
    """Turn an OSError of the block into a UserError: `what` failed, why, and `advice`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}{advice}") from error


@contextmanager
def atomic_output(path: str | Path) -> Iterator[Path]:
    """Give a temporary path in the folder of `path` (same suffix); it replaces `path` when the block succeeds.

    Missing folders are made. An existing `path` stays unchanged when the block fails.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give a file name")
    with report_os_errors(f"cannot write {path}", "; give a folder that can be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    staging = Path(name)
    try:
        with report_os_errors(f"cannot write {path}"):
            yield staging
            umask = os.umask(0)  # mkstemp makes files only the owner can read; the result gets ordinary rights
            os.umask(umask)
            staging.chmod(0o666 & ~umask)
            os.replace(staging, path)
    finally:
        with suppress(FileNotFoundError):
            staging.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, atomically."""
    with atomic_output(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any, indent: int | None = 1) -> None:
    """Write a JSON file, atomically."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def refuse_links(folder: Path) -> None:
    """Raise UserError if `folder` holds a link, by which another person could make us write elsewhere."""
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in folders + files):
            if path.is_symlink():
                raise UserError(f"{path} is a link: put the file or folder itself there")


def _named(folder: str | Path, setting: str) -> Path:
    """Return the folder that a setting names, which must not be empty."""
    if not str(folder):
        raise UserError(f"{setting}= is empty: name a folder")
    return Path(folder)


@contextmanager
def writable(folder: str | Path, setting: str = "output") -> Iterator[None]:
    """Create the folder that `setting` names, or fail before any work; new folders that stay empty are removed."""
    folder = _named(folder, setting)
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
    with report_os_errors(f"cannot write to {setting}={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    try:
        yield
    finally:
        for path in new_folders:
            with suppress(OSError):  # not empty
                path.rmdir()


def require_space(folder: str | Path, setting: str) -> None:
    """Check that the folder which the setting names could be written, on a disk with `SPACE` megabytes free.

    It is not made: of several processes that check it, one would remove it while another writes.
    """
    path = _named(folder, setting).absolute()
    with report_os_errors(f"cannot write to {setting}={folder}"):
        there = next(p for p in (path, *path.parents) if p.exists())
        tempfile.TemporaryFile(dir=there).close()
        free = shutil.disk_usage(there).free / 1e6
    if free < SPACE:
        raise UserError(f"{setting}={folder}: {free:,.0f} MB are free, this needs {SPACE} MB: choose another disk")


@contextmanager
def all_or_none(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder inside `folder`; its files move there together when the block succeeds."""
    folder = Path(folder)
    staging = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
    try:
        with report_os_errors(f"cannot write to output={folder}"):
            yield staging
            for path in sorted(staging.iterdir()):
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
