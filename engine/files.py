"""Atomic output files and checks of output folders."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.errors import UserError, causes

CHECKOUT = Path(__file__).resolve().parents[1]  # the folder of this repository
SPACE = 500  # minimum free disk space of a run in megabytes
_UMASK = os.umask(0)  # read once, as reading it changes it for all threads
os.umask(_UMASK)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # the disk is full or read-only, or a file too large


@contextmanager
def report_os_errors(what: str, advice: str = "") -> Iterator[None]:
    """Convert an OSError in the block to a UserError that states the failed operation `what`, the reason, and
    `advice`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}{advice}") from error


def write_failure(error: BaseException, *others: int) -> OSError | None:
    """Return the error of a full or read-only disk among an error and its `causes`. None: there is none.

    Args:
        others: further error numbers that count.
    """
    numbers = {*NO_SPACE, *others}
    return next((e for e in causes(error) if isinstance(e, OSError) and e.errno in numbers), None)


@contextmanager
def atomic_output(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, with the same suffix, which replaces `path` when the block succeeds.

    Missing folders are created. An existing `path` is unchanged if the block fails.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder, not a file")
    with report_os_errors(f"cannot write {path}", "; choose a writable folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".part-", suffix=path.suffix, dir=path.parent)  # a short name
        os.close(handle)
    staging = Path(name)
    try:
        with report_os_errors(f"cannot write {path}"):
            yield staging
            staging.chmod(0o666 & ~_UMASK)  # mkstemp creates files with mode 0600
            os.replace(staging, path)
    finally:
        with suppress(FileNotFoundError):
            staging.unlink()


def find_files(root: Path, *suffixes: str) -> list[Path]:
    """Return the files with one of the suffixes in any folder below `root`, sorted, as relative paths.

    Links to folders are followed, as corpora are often spread over disks, but no folder is visited twice.
    """
    files = []
    visited = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in visited:
            folders.clear()
            continue
        visited.add(place)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))  # a folder before its links
        files += [Path(folder, name).relative_to(root) for name in names if name.lower().endswith(suffixes)]
    return sorted(files, key=Path.as_posix)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_output(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any, indent: int | None = 1) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def refuse_links(folder: Path) -> None:
    """Raise UserError if `folder` contains a symbolic link, through which files elsewhere could be overwritten."""
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in folders + files):
            if path.is_symlink():
                raise UserError(f"{path} is a link: replace it with the file or folder itself")


def _named(folder: str | Path, setting: str) -> Path:
    """Return the folder of a setting, which must not be empty."""
    if not str(folder):
        raise UserError(f"{setting}= is empty: expected a folder")
    return Path(folder)


@contextmanager
def writable(folder: str | Path, setting: str = "output") -> Iterator[None]:
    """Create the folder of `setting` before any work begins. New folders that stay empty are removed.

    Raises:
        UserError: If the folder cannot be created, or files cannot be written to it.
    """
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
    """Check that the folder of `setting` is writable, on a disk with `SPACE` megabytes free.

    The folder is not created, as concurrent processes could remove each other's folder.
    """
    path = _named(folder, setting).absolute()
    with report_os_errors(f"cannot write to {setting}={folder}"):
        there = next(p for p in (path, *path.parents) if p.exists())
        tempfile.TemporaryFile(dir=there).close()
        free = shutil.disk_usage(there).free / 1e6
    if free < SPACE:
        raise UserError(f"{setting}={folder}: {free:,.0f} MB free, but {SPACE} MB are required: choose another disk")


@contextmanager
def all_or_none(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder inside `folder`. Its files are moved to `folder` when the block succeeds.

    Errors name `folder` instead of the temporary folder.
    """
    folder = Path(folder)
    staging = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
    try:
        with report_os_errors(f"cannot write to output={folder}"):
            yield staging
            for path in sorted(staging.iterdir()):
                os.replace(path, folder / path.name)
    except UserError as error:
        raise UserError(str(error).replace(str(staging), str(folder))) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
