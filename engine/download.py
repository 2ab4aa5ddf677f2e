"""Download files into a folder: resumed, verified and renamed when complete. A complete file is never touched."""

from __future__ import annotations

import hashlib
import io
import os
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants, errors
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, tqdm

from engine.errors import UserError, printable
from engine.files import report_os_errors

TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 4  # at a server with errors (5xx)
STAGING = ".partial"  # folder of incomplete files


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    path: where it goes, relative to the folder.
    url: where it comes from.
    size: in bytes; sha256: hex digest; None if unknown. about: a rounded size, which is shown and not checked.
    most: bytes to accept from a server if the size is unknown.
    """

    path: str
    url: str
    size: int | None = None
    sha256: str | None = None
    most: int = 2**37
    about: int | None = None


class NoNetworkError(UserError):
    """The server cannot be reached at all."""


class DamagedError(UserError):
    """A file has the wrong size or digest, or is a web page."""


def check(path: Path, file: RemoteFile) -> None:
    """Compare a local file with the size and digest of `file`; without a known digest, it must not be a web page."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        raise DamagedError(f"{path} has {size:,} bytes instead of {file.size:,}")
    with path.open("rb") as stream:
        if file.sha256 is None:
            if stream.read(256).lstrip().lower().startswith((b"<!doctype html", b"<html")):
                raise DamagedError(f"{path} is a web page instead of a file: open its address in a browser")
            return
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != file.sha256:
        raise DamagedError(f"{path} has SHA-256 {digest[:12]}... instead of {file.sha256[:12]}...")


def fetch(file: RemoteFile, folder: str | Path, retry_delay: float = 1.0, progress: bool = True) -> bool:
    """Download `file` into `folder`. Return True if it was downloaded, False if a good file was there already.

    Incomplete files stay in FOLDER/.partial until they are verified; an interrupted download resumes from there.

    Args:
        retry_delay: seconds after a server's first error; doubled after each further one.
        progress: show a progress bar on a terminal.
    """
    target = Path(folder) / file.path
    part = Path(folder) / STAGING / f"{file.path.replace('/', '-')}.part"
    if target.is_file():
        with suppress(DamagedError):  # it is replaced after a good one has arrived
            check(target, file)
            return False
    check_reachable("{0.scheme}://{0.netloc}".format(urlsplit(file.url)))
    with report_os_errors(f"cannot write {target}"):
        part.parent.mkdir(parents=True, exist_ok=True)
        _append(part, file, retry_delay, progress)
        try:
            check(part, file)
        except DamagedError as error:
            part.unlink()
            raise DamagedError(f"the download of {file.url} was deleted: {error}") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, target)
    return True


@lru_cache
def check_reachable(address: str) -> None:
    """Send one quick request; raise NoNetworkError if there is no answer of any kind.

    Without a network, huggingface_hub would retry for half a minute, with a line each time.
    """
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # any answer shows that the server is there
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        why = getattr(error, "reason", error)
        raise NoNetworkError(f"{address} cannot be reached ({why}): is there a network?") from error


def _append(part: Path, file: RemoteFile, retry_delay: float, progress: bool) -> None:
    """Append the rest of the file to its part; wait and retry while the server has errors (5xx)."""
    headers = build_hf_headers() if file.url.startswith(constants.ENDPOINT) else {"User-Agent": "speaking-faces"}
    options = {"headers": headers, "expected_size": file.size, "tqdm_class": tqdm if progress else _NoBar}
    for attempt in range(ATTEMPTS):
        size = part.stat().st_size if part.is_file() else 0
        try:
            with _Limited(part, file) as out:
                return http_get(file.url, out, resume_size=size, **options)
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status == 416 and size:  # the part is longer than the file
                part.unlink()
            elif status < 500 or attempt == ATTEMPTS - 1:
                raise UserError(f"{file.url} answered {status}: {printable(error)[:200]}") from error
            else:
                time.sleep(retry_delay * 2**attempt)
        # errors.HTTPError is httpx's in huggingface_hub 1, and httpx2's in huggingface_hub 2.
        except (errors.HTTPError, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise  # the disk's fault
            raise UserError(
                f"{file.url} did not arrive whole ({printable(error)[:200]}): run the command again"
            ) from error


class _Limited(io.BufferedWriter):
    """A file to append to, up to the size that is expected."""

    def __init__(self, path: Path, file: RemoteFile) -> None:
        super().__init__(io.FileIO(path, "a"))
        self.url = file.url
        self.most = file.most if file.size is None else file.size

    def write(self, data: bytes) -> int:
        if self.tell() + len(data) > self.most:
            raise UserError(f"{self.url} sends more than the {self.most:,} bytes that were expected")
        return super().write(data)


class _NoBar(tqdm):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs | {"disable": True})
