"""Where shards lie: in a folder, or behind a URL, whose files come through a cache on the local disk."""

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
from engine.download import NoNetworkError, RemoteFile, fetch
from engine.errors import UserError
from engine.files import atomic_output, checksum
from engine.untrusted import safe_name

BLOCK = 1 << 22
RETRY_DELAY = 1.0  # seconds before a second attempt; doubled for each further one
ATTEMPTS = 5  # at a file of a store such as s3://
MAX_JSON = 2**27  # bytes of an index or sidecar; a million shards take 80 MB
AHEAD = 2  # shards that a process fetches at once while it trains


def is_remote(source: str | Path) -> bool:
    """Return whether `source` is a URL (https://..., s3://...) and no path."""
    return "://" in str(source)


def join(source: str | Path, *names: str) -> str:
    """Return a path or URL below `source`."""
    return "/".join([str(source).rstrip("/"), *names])


def read_json(source: str | Path) -> Any:
    """Return the JSON at a path or URL, as it is now."""
    if not is_remote(source):
        return untrusted.read_json(source)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.json"
        _get(str(source), path)
        return untrusted.read_json(path, source)


def read_index(source: str | Path) -> dict[str, Any]:
    """Return the index.json of a split, its entries of shards checked: their names become names of files."""
    path = join(source, "index.json")
    index = read_json(path)
    shards = index.get("shards") if isinstance(index, dict) else None
    if not isinstance(shards, list):
        raise UserError(f"{path} is damaged: it has no list of shards")
    for number, shard in enumerate(shards):
        counts = [shard.get(key) for key in ("bytes", "crc32", "clips")] if isinstance(shard, dict) else [None]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise UserError(f"{path} is damaged: shard {number} needs bytes, crc32 and clips as whole numbers")
        safe_name(shard.get("name"), f"{path}: the name of shard {number}")
    return index


def verify_once(path: Path, crc32: int) -> None:
    """Compare a file's checksum, unless that was done since the file was last written.

    What was verified is noted in an empty file in the folder `.verified` beside the file, for all machines that share
    the disk; if that cannot be written, in the machine's folder of temporary files. One process of a machine reads, the
    others that ask for the same file wait.
    """
    about = path.stat()
    key = repr((path.name, about.st_size, about.st_mtime_ns, crc32)).encode()
    name = f"verified-{hashlib.blake2b(key, digest_size=16).hexdigest()}"
    beside = path.parent / ".verified" / name
    if beside.exists():
        return
    place = repr((str(path.resolve()), about.st_ino)).encode()
    note = _scratch() / f"{name}-{hashlib.blake2b(place, digest_size=16).hexdigest()}"
    with FileLock(note.with_suffix(".lock")):
        if note.exists() or beside.exists():
            return
        if checksum(path) != crc32:
            raise UserError(f"shard {path} is damaged (its checksum is wrong): copy it or prepare it again")
        try:
            beside.parent.mkdir(exist_ok=True)
            beside.touch()
        except OSError:  # such as a disk that cannot be written
            note.touch()


def _scratch() -> Path:
    """Return this user's folder in the machine's folder of temporary files."""
    folder = Path(tempfile.gettempdir()) / f"speaking-faces-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: remove it, or set TMPDIR to another folder")
    return folder


class SplitFiles:
    """The files of one split, in a folder or behind a URL. All processes of a machine share a folder of remote copies.

    A copy appears whole and verified or not at all, and is fetched by one process while the others wait. When the
    copies exceed the limit, those that were opened longest ago are deleted; a process that has one open can still read
    it.

    Args:
        source: a folder as `scripts/prepare_data.py` leaves it, or a URL: http(s), or what fsspec has a package for.
        cache: folder of copies, of any number of URLs.
        limit: of the copies, in bytes.

    Attributes:
        index: the split's index.json. Its entries of shards have name, bytes and crc32.
    """

    def __init__(self, source: str | Path, cache: str | Path, limit: int) -> None:
        self.source = str(source)
        self.remote = is_remote(source)
        if not self.remote and not Path(source, "index.json").is_file():
            raise UserError(f"no prepared shards in {source}: make them with python scripts/prepare_data.py")
        self.index = read_index(source)
        self.folder = Path(source)
        self.cache = Path(cache)
        self.limit = limit
        self._slots: tuple[int, threading.Semaphore] | None = None
        self._asked: set[str] = set()
        if self.remote:  # another index, other copies
            known = json.dumps([source, self.index], sort_keys=True).encode()
            self.folder = self.cache / hashlib.blake2b(known, digest_size=8).hexdigest()
            largest = max((shard["bytes"] for shard in self.index["shards"]), default=0)
            if limit < 2 * largest:
                least = f"{4 * largest / 1e9:.1f}"
                raise UserError(f"a shard cache of {limit / 1e9:g} GB is too small for {source}: give {least}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_slots": None, "_asked": set()}

    def sidecar(self, shard: dict[str, Any]) -> dict[str, Any]:
        name = f"{shard['name']}.json"
        return read_json(self._fetched(name) if self.remote else self.folder / name)

    def tar(self, shard: dict[str, Any]) -> Path:
        """Return the shard's path, fetched now if it is not there; UserError if it is missing or not whole."""
        path = self.folder / f"{shard['name']}.tar"
        if self.remote:
            self._fetched(path.name, shard)
            with suppress(OSError):
                os.utime(path)  # the deletion goes by this time
        elif not path.is_file():
            raise UserError(
                f"shard {path} is missing: copy it again, or prepare it with python scripts/prepare_data.py"
            )
        elif path.stat().st_size != shard["bytes"]:
            raise UserError(f"shard {path} is damaged: {path.stat().st_size:,} bytes instead of {shard['bytes']:,}")
        return path

    def prefetch(self, shards: Iterable[dict[str, Any]]) -> None:
        """Fetch remote shards in the background. What goes wrong shows when the shard is opened."""
        if not self.remote:
            return
        if self._slots is None or self._slots[0] != os.getpid():  # threads do not live on in a forked process
            self._slots = (os.getpid(), threading.Semaphore(AHEAD))
            self._asked = set()
        for shard in shards:
            if shard["name"] not in self._asked and not (self.folder / f"{shard['name']}.tar").is_file():
                self._asked.add(shard["name"])
                # No pool: a process would not end before its pool's last download.
                threading.Thread(target=self._fetch_ahead, args=(shard,), daemon=True).start()

    def _fetch_ahead(self, shard: dict[str, Any]) -> None:
        with self._slots[1], suppress(UserError):
            self._fetched(f"{shard['name']}.tar", shard)
        self._asked.discard(shard["name"])

    def _fetched(self, name: str, shard: dict[str, Any] | None = None) -> Path:
        """Return the copy of a file, fetched now if it is not there; that of a `shard` is verified."""
        path = self.folder / name
        if path.is_file():
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"{name}.lock"):
            if path.is_file():  # another process has just fetched it
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
            self._make_room(path)
        return path

    def _make_room(self, newest: Path) -> None:
        copies = []
        for path in self.cache.glob("*/*.tar"):
            with suppress(FileNotFoundError):  # another process deletes, too
                copies.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= self.limit:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


def _get(url: str, path: Path, size: int | None = None) -> None:
    """Copy a URL's file to `path`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if urlsplit(url).scheme in ("http", "https"):
        try:
            fetch(RemoteFile(path.name, url, size, most=MAX_JSON), path.parent, retry_delay=RETRY_DELAY, progress=False)
        except NoNetworkError:
            raise
        except UserError as error:
            raise UserError(f"{url} could not be fetched: {error}") from error
        return
    import fsspec  # slow to import, and most runs do without

    most = MAX_JSON if size is None else size
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with fsspec.open(url, "rb") as stream, atomic_output(path) as staging, staging.open("wb") as out:
                while block := stream.read(BLOCK):
                    if out.tell() + len(block) > most:
                        raise UserError(f"{url} sends more bytes than were expected")
                    out.write(block)
            return
        except ImportError as error:
            raise UserError(
                f"{url}: {error}; `bash scripts/setup.sh remote` installs what s3:// and gs:// need"
            ) from error
        except UserError:
            raise
        except Exception as error:  # each store has its own classes for a failed request
            if attempt == ATTEMPTS or isinstance(error, FileNotFoundError | PermissionError):
                raise UserError(f"{url} could not be fetched: {error}") from error
            time.sleep(RETRY_DELAY * 2 ** (attempt - 1))
