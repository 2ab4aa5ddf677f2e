"""Downloads files into a folder: resumed, verified, renamed when complete; a complete file is never touched.

A URL is fetched with the standard library, a file of the Hugging Face hub through huggingface_hub.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants, errors, hf_hub_download

from engine.errors import UserError
from engine.progress import track
from engine.untrusted import parse_json

BLOCK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
MAX_FAILED_ATTEMPTS = 4  # in a row that bring no new byte
STAGING = ".partial"  # folder of incomplete files


@dataclass(frozen=True)
class HubFile:
    """A file of a repository of the hub. `revision` is a commit; None takes the newest."""

    repo: str
    name: str
    revision: str | None = None
    kind: str = "model"

    def __str__(self) -> str:
        kind = "" if self.kind == "model" else f"{self.kind}s/"
        return f"https://huggingface.co/{kind}{self.repo}/blob/{self.revision or 'main'}/{self.name}"


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    path: where it goes, relative to the folder.
    source: a URL or a file on the hub.
    size: in bytes; sha256: hex digest; None if unknown. about: a rounded size, which is shown and not checked.
    most: bytes to accept from a server if the size is unknown.
    """

    path: str
    source: str | HubFile
    size: int | None = None
    sha256: str | None = None
    most: int = 2**37
    about: int | None = None


class NoNetworkError(UserError):
    """The server cannot be reached at all."""


class DamagedError(UserError):
    """A file has the wrong size, digest or format."""


def check(path: Path, file: RemoteFile) -> None:
    """Compare a local file with the size and digest of `file`; without a known digest, its format must be complete.

    Raises:
        DamagedError: size, digest or format is wrong.
    """
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        raise DamagedError(f"{path} has {size:,} bytes instead of {file.size:,}")
    if file.sha256 is None:
        if not _is_whole(path, Path(file.path).suffix):
            raise DamagedError(f"{path} is not a whole {Path(file.path).suffix} file")
        return
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != file.sha256:
        raise DamagedError(f"{path} has SHA-256 {digest.hexdigest()[:12]}... instead of {file.sha256[:12]}...")


def fetch(
    file: RemoteFile, folder: str | Path, endpoint: str | None = None, retry_delay: float = 1.0, progress: bool = True
) -> bool:
    """Download `file` into `folder`. Returns True if it was downloaded, False if a good file was there already.

    Incomplete files stay in FOLDER/.partial until they are verified; an interrupted download resumes from there.

    Args:
        endpoint: address of the hub; None for the standard one.
        retry_delay: seconds before the second attempt; doubled for each further attempt.
        progress: show a progress bar on standard error.

    Raises:
        NoNetworkError: the server cannot be reached.
        DamagedError: verification failed twice.
        UserError: the server refused, or the folder cannot be written.
    """
    target = Path(folder) / file.path
    if target.is_file():
        try:
            check(target, file)
            return False
        except DamagedError:
            pass  # replaced once a good one is here
    staging = Path(folder) / STAGING
    try:
        for attempt in (1, 2):
            if isinstance(file.source, HubFile):
                arrived = _from_hub(file.source, staging, endpoint, force=attempt == 2)
            else:
                arrived = staging / f"{file.path.replace('/', '-')}.part"
                arrived.parent.mkdir(parents=True, exist_ok=True)
                _from_url(file, arrived, retry_delay, progress)
            try:
                check(arrived, file)
                break
            except DamagedError as error:
                arrived.unlink()
                if attempt == 2:
                    raise DamagedError(
                        f"verification failed after two downloads of {file.source} ({error}); the file was deleted"
                    ) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(arrived, target)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        raise UserError(f"cannot write {target}: {'the disk is full' if full else error}") from error
    return True


def _is_whole(path: Path, suffix: str) -> bool:
    """Whether a file of a known format is complete; True for other formats."""
    with path.open("rb") as stream:
        head = stream.read(8)
        if suffix == ".safetensors":
            size = int.from_bytes(head, "little")
            try:
                header = parse_json(stream.read(size), path) if size < 100 * BLOCK else {}
                ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
                return path.stat().st_size == 8 + size + max(ends, default=0)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError):
                return False
    if suffix == ".json":
        try:
            parse_json(path.read_bytes(), path)
        except UserError:
            return False
    if suffix in (".pth", ".pt", ".ckpt", ".model"):  # a zip since PyTorch 1.6, a bare pickle before
        return zipfile.is_zipfile(path) or head[:1] == b"\x80"
    return True


@lru_cache
def check_reachable(address: str) -> None:
    """One quick request: without a network, huggingface_hub would retry for half a minute, with a line each time."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # any answer shows that the server is there
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        why = getattr(error, "reason", error)
        raise NoNetworkError(f"{address} cannot be reached ({why}): is there a network?") from error


def _from_hub(place: HubFile, staging: Path, endpoint: str | None, force: bool) -> Path:
    check_reachable(endpoint or constants.ENDPOINT)
    try:
        return Path(
            hf_hub_download(
                place.repo,
                place.name,
                repo_type=place.kind,
                revision=place.revision,
                local_dir=staging / place.repo.replace("/", "-"),
                force_download=force,
                endpoint=endpoint,
            )
        )
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError) as error:
        raise UserError(f"the hub does not give {place}: {_one_line(error.__cause__ or error)}") from error
    # errors.HTTPError is httpx's in huggingface_hub 1, and httpx2's in huggingface_hub 2.
    except (errors.HTTPError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the disk's fault
        raise UserError(f"{place} did not arrive whole ({_one_line(error)}): run the command again") from error


def _from_url(file: RemoteFile, part: Path, retry_delay: float, progress: bool) -> None:
    """Append the rest of the file to `part`; retries as long as attempts bring new bytes."""
    url, size, most = file.source, file.size, file.most if file.size is None else file.size
    failed_attempts, why = 0, ""
    while failed_attempts < MAX_FAILED_ATTEMPTS:
        have = part.stat().st_size if part.is_file() else 0
        if size is not None and have > size:
            part.unlink()
            have = 0
        if size is not None and have == size:
            return
        if failed_attempts:
            time.sleep(retry_delay * 2 ** (failed_attempts - 1))
        try:
            if _attempt(url, part, have, most, progress):
                return
            why = "the answer ended early"
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # the file on the server has changed
                part.unlink()
                have = 0
            elif error.code < 500 and error.code != 429:
                raise UserError(f"{url} answered {error.code} {error.reason}") from error
            why = f"it answered {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            why = str(getattr(error, "reason", error) or type(error).__name__)
            if have == 0 and isinstance(error, urllib.error.URLError) and failed_attempts:
                raise NoNetworkError(f"{url} cannot be reached ({why}): is there a network?") from error
        now = part.stat().st_size if part.is_file() else 0
        failed_attempts = 0 if now > have else failed_attempts + 1
    raise UserError(f"{url} did not arrive whole ({why}): run the command again to go on")


def _attempt(url: str, part: Path, have: int, most: int, progress: bool) -> bool:
    """One request for the bytes from `have` on; whether the file is now as long as the server says."""
    headers = {"User-Agent": "speaking-faces", **({"Range": f"bytes={have}-"} if have else {})}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise UserError(f"{url} answered with a web page instead of a file: open it in a browser")
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        length = answer.headers.get("Content-Length")
        start = have if goes_on else 0
        with part.open("ab" if goes_on else "wb") as out:
            blocks = _blocks(answer)
            if progress and length is not None and int(length) > BLOCK:
                blocks = track(blocks, -(-int(length) // BLOCK), "MiB")
            for block in blocks:
                if out.tell() + len(block) > most:
                    raise UserError(f"{url} sends more than the {most:,} bytes that were expected")
                out.write(block)
    return length is None or part.stat().st_size == start + int(length)


def _blocks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    while block := answer.read(BLOCK):
        yield block


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
