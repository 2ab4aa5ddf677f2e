"""Shard storage: a local folder, or a URL with a cache on the local disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from engine import untrusted
from engine.errors import UserError
from engine.files import atomic_output, checksum
from engine.untrusted import safe_name

BLOCK = 1 << 22
RETRY_DELAY = 1.0  # seconds before the first retry, doubled for each further one
ATTEMPTS = 5  # attempts at a file of object storage such as s3://
MAX_JSON = 2**27  # maximum size of an index or sidecar in bytes; a million shards take 80 MB
AHEAD = 2  # number of concurrent downloads per process


def is_remote(source: str | Path) -> bool:
    """Return whether `source` is a URL (https://..., s3://...) and not a path."""
    return "://" in str(source)


def join(source: str | Path, *names: str) -> str:
    """Return a path or URL below `source`."""
    return "/".join([str(source).rstrip("/"), *names])


def read_json(source: str | Path) -> Any:
    """Return the current JSON contents of a path or URL."""
    if not is_remote(source):
        return untrusted.read_json(source)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.json"
        _get(str(source), path)
        return untrusted.read_json(path, source)


def read_index(source: str | Path) -> dict[str, Any]:
    """Return the contents of a split's index.json, after checking the entries of shards, which become file names."""
    path = join(source, "index.json")
    index = read_json(path)
    shards = index.get("shards") if isinstance(index, dict) else None
    if not isinstance(shards, list):
        raise UserError(f"{path} is damaged: it has no list of shards")
    for number, shard in enumerate(shards):
        counts = [shard.get(key) for key in ("bytes", "crc32", "clips")] if isinstance(shard, dict) else [None]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise UserError(f"{path} is damaged: shard {number} must have bytes, crc32 and clips as integers")
        safe_name(shard.get("name"), f"{path}: the name of shard {number}")
    return index


def verify_once(path: Path, crc32: int) -> None:
    """Verify the checksum of a file, unless this was done since its last modification.

    Verified files are marked by an empty file in the folder `.verified` next to the file, for all machines that share
    the disk, or in the temporary folder if that is read-only. One process per machine reads the file, while others
    wait.
    """
    status = path.stat()
    content = repr((path.name, status.st_size, status.st_mtime_ns, crc32)).encode()
    name = f"verified-{hashlib.blake2b(content, digest_size=16).hexdigest()}"
    shared_marker = path.parent / ".verified" / name
    if shared_marker.exists():
        return
    location = repr((str(path.resolve()), status.st_ino)).encode()
    local_marker = _scratch() / f"{name}-{hashlib.blake2b(location, digest_size=16).hexdigest()}"
    with FileLock(local_marker.with_suffix(".lock")):
        if local_marker.exists() or shared_marker.exists():
            return
        if checksum(path) != crc32:
            raise UserError(f"shard {path} is damaged (its checksum is wrong): copy it or prepare it again")
        try:
            shared_marker.parent.mkdir(exist_ok=True)
            shared_marker.touch()
        except OSError:  # such as a read-only disk
            local_marker.touch()


def _scratch() -> Path:
    """Return this user's folder within the system's temporary folder."""
    folder = Path(tempfile.gettempdir()) / f"speaking-faces-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: remove it, or set TMPDIR to another folder")
    return folder


class SplitFiles:
    """The files of one split, in a folder or at a URL. All processes of a machine share a cache of remote files.

    Cached files are verified and stored atomically, and fetched by one process while others wait. When the cache
    exceeds its limit, the least recently used files are deleted; a process that has one open can still read it.

    Args:
        source: a folder written by `scripts/prepare_data.py`, or a URL: http(s), or any protocol that fsspec supports.
        cache: cache folder, which several URLs can share.
        limit: size limit of the cache in bytes.

    Attributes:
        index: the split's index.json. Its shard entries have name, bytes and crc32.
    """

    def __init__(self, source: str | Path, cache: str | Path, limit: int) -> None:
        self.source = str(source)
        self.remote = is_remote(source)
        if not self.remote and not Path(source, "index.json").is_file():
            raise UserError(f"no prepared shards in {source}: create them with python scripts/prepare_data.py")
        self.index = read_index(source)
        self.folder = Path(source)
        self.cache = Path(cache)
        self.limit = limit
        self._slots: tuple[int, threading.Semaphore] | None = None
        self._requested: set[str] = set()  # names of shards that are being fetched in the background
        if self.remote:  # a new index has a separate cache
            known = json.dumps([source, self.index], sort_keys=True).encode()
            self.folder = self.cache / hashlib.blake2b(known, digest_size=8).hexdigest()
            largest = max((shard["bytes"] for shard in self.index["shards"]), default=0)
            if limit < 2 * largest:
                least = f"{4 * largest / 1e9:.1f}"
                raise UserError(f"the shard cache of {limit / 1e9:g} GB is too small for {source}: set {least}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_slots": None, "_requested": set()}

    def sidecar(self, shard: dict[str, Any]) -> dict[str, Any]:
        name = f"{shard['name']}.json"
        return read_json(self._fetched(name) if self.remote else self.folder / name)

    def tar(self, shard: dict[str, Any]) -> Path:
        """Return the path of a shard, fetching it if necessary. Raise UserError if it is missing or incomplete."""
        path = self.folder / f"{shard['name']}.tar"
        if self.remote:
            self._fetched(path.name, shard)
            with suppress(OSError):
                os.utime(path)  # the deletion order depends on this time
        elif not path.is_file():
            raise UserError(
                f"shard {path} is missing: copy it again, or prepare it with python scripts/prepare_data.py"
            )
        elif path.stat().st_size != shard["bytes"]:
            size = f"{path.stat().st_size:,} bytes instead of {shard['bytes']:,}"
            raise UserError(f"shard {path} is damaged: {size}; copy it or prepare it again")
        return path

    def prefetch(self, shards: Iterable[dict[str, Any]]) -> None:
        """Fetch remote shards in the background. Errors are reported when the shard is opened."""
        if not self.remote:
            return
        if self._slots is None or self._slots[0] != os.getpid():  # threads do not survive a fork
            self._slots = (os.getpid(), threading.Semaphore(AHEAD))
            self._requested = set()
        for shard in shards:
            if shard["name"] not in self._requested and not (self.folder / f"{shard['name']}.tar").is_file():
                self._requested.add(shard["name"])
                # No pool: a process would not exit before the last download of its pool.
                threading.Thread(target=self._fetch_ahead, args=(shard,), daemon=True).start()

    def _fetch_ahead(self, shard: dict[str, Any]) -> None:
        with self._slots[1], suppress(UserError):
            self._fetched(f"{shard['name']}.tar", shard)
        self._requested.discard(shard["name"])

    def _fetched(self, name: str, shard: dict[str, Any] | None = None) -> Path:
        """Return the cached copy of a file, fetching it if necessary. Shards are verified."""
        path = self.folder / name
        if path.is_file():
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"{name}.lock"):
            if path.is_file():  # another process has fetched it in the meantime
                return path
            arrival = self.folder / ".arriving" / name
            url = join(self.source, name)
            for _ in range(2):
                _get(url, arrival, shard and shard["bytes"])
                if shard is None or (arrival.stat().st_size, checksum(arrival)) == (shard["bytes"], shard["crc32"]):
                    break
                arrival.unlink()
            else:
                raise UserError(f"shard {url} is damaged: checksum mismatch after two downloads")
            os.replace(arrival, path)
            self._evict(path)
        return path

    def _evict(self, newest: Path) -> None:
        """Delete the least recently used shards until the cache is within its limit."""
        copies = []
        for path in self.cache.glob("*/*.tar"):
            with suppress(FileNotFoundError):  # another process may delete concurrently
                copies.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= self.limit:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


def _get(url: str, path: Path, size: int | None = None) -> None:
    """Copy the file of a URL to `path` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if urlsplit(url).scheme in ("http", "https"):
        from engine.download import NoNetworkError, RemoteFile, fetch  # takes half a second, and most splits are local

        try:
            fetch(RemoteFile(path.name, url, size, most=MAX_JSON), path.parent, retry_delay=RETRY_DELAY, progress=False)
        except NoNetworkError:
            raise
        except UserError as error:
            raise UserError(f"{url} could not be fetched: {error}") from error
        return
    import fsspec  # slow to import, and rarely needed

    most = MAX_JSON if size is None else size
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with fsspec.open(url, "rb") as stream, atomic_output(path) as staging, staging.open("wb") as out:
                while block := stream.read(BLOCK):
                    if out.tell() + len(block) > most:
                        raise UserError(f"{url} has more than the expected {most:,} bytes: upload the shards again")
                    out.write(block)
            return
        except ImportError as error:
            raise UserError(
                f"{url}: {error}; `bash scripts/setup.sh remote` installs what s3:// and gs:// need"
            ) from error
        except UserError:
            raise
        except Exception as error:  # each storage backend raises its own exception types
            if attempt == ATTEMPTS or isinstance(error, FileNotFoundError | PermissionError):
                raise UserError(f"{url} could not be fetched: {error}") from error
            time.sleep(RETRY_DELAY * 2 ** (attempt - 1))
