"""Downloads of files into a folder: resumable, verified, and renamed when complete. A complete file is never
modified.
"""

from __future__ import annotations

import hashlib
import http.client
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
ATTEMPTS = 4  # at a request to which the server responds with an error (5xx)
STAGING = ".partial"  # folder for incomplete files


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Attributes:
        path: target path, relative to the folder.
        url: address of the file.
        size: size in bytes.
        sha256: hex digest. None if unknown.
        about: approximate size, which is shown but not checked.
        most: maximum bytes to accept if the size is unknown.
    """

    path: str
    url: str
    size: int | None = None
    sha256: str | None = None
    most: int = 2**37
    about: int | None = None


class NoNetworkError(UserError):
    """The server cannot be reached."""


class DamagedError(UserError):
    """A file has the wrong size or digest, or is an HTML page."""


def check(path: Path, file: RemoteFile) -> None:
    """Verify the size and digest of a local file. Without a known digest, the file must not be an HTML page."""
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
    """Download `file` into `folder`. Return True if it was downloaded, False if a valid file already existed.

    Incomplete files are kept in FOLDER/.partial until they are verified, so that downloads can be resumed.

    Args:
        retry_delay: seconds to wait after the first server error, doubled after each further error.
        progress: show a progress bar on a terminal.
    """
    target = Path(folder) / file.path
    part = Path(folder) / STAGING / f"{file.path.replace('/', '-')}.part"
    if target.is_file():
        with suppress(DamagedError):  # the invalid file is replaced once a valid one has been downloaded
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
    """Send one quick request. Raise NoNetworkError if there is no response at all.

    Without a network, huggingface_hub would retry and log for half a minute.
    """
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # any response shows that the server is reachable
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not an address
        why = printable(getattr(error, "reason", error))
        raise NoNetworkError(f"{address} cannot be reached ({why}): check the network connection") from error


def _append(part: Path, file: RemoteFile, retry_delay: float, progress: bool) -> None:
    """Append the remaining bytes of the file to its partial download. Wait and retry on server errors (5xx)."""
    headers = build_hf_headers() if file.url.startswith(constants.ENDPOINT) else {"User-Agent": "speaking-faces"}
    options = {"headers": headers, "expected_size": file.size, "tqdm_class": tqdm if progress else _NoBar}
    for attempt in range(ATTEMPTS):
        size = part.stat().st_size if part.is_file() else 0
        try:
            with _Limited(part, file) as out:
                return http_get(file.url, out, resume_size=size, **options)
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status == 416 and size:  # the partial file is longer than the file
                part.unlink()
            elif status < 500 or attempt == ATTEMPTS - 1:
                raise UserError(f"{file.url} returned status {status}: {printable(error)[:200]}") from error
            else:
                time.sleep(retry_delay * 2**attempt)
        # errors.HTTPError is httpx's in huggingface_hub 1, and httpx2's in huggingface_hub 2.
        except (errors.HTTPError, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise  # an error of the disk
            raise UserError(
                f"{file.url} was not downloaded completely ({printable(error)[:200]}): run the command again"
            ) from error


class _Limited(io.BufferedWriter):
    """A file opened for appending, up to the expected size."""

    def __init__(self, path: Path, file: RemoteFile) -> None:
        super().__init__(io.FileIO(path, "a"))
        self.url = file.url
        self.most = file.most if file.size is None else file.size

    def write(self, data: bytes) -> int:
        if self.tell() + len(data) > self.most:
            raise UserError(f"{self.url} sends more than the expected {self.most:,} bytes")
        return super().write(data)


class _NoBar(tqdm):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs | {"disable": True})
