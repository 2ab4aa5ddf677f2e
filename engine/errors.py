"""User-facing errors: an exception that becomes one line and exit code 2, missing packages, and skipped clips."""

from __future__ import annotations

import importlib
import importlib.util
import os
import select
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from filelock import FileLock


class UserError(ValueError):
    """An error caused by user input. The message states the offending value and what to do about it."""


def printable(text: object) -> str:
    """Return `text` as one line. Terminal control characters, such as escapes, are replaced by question marks."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def reason_of(error: Exception) -> str:
    """Return the message of an error. That of an unexpected error begins with its type."""
    return str(error) if isinstance(error, UserError) else f"unexpected {type(error).__name__}: {error}"


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, then its cause, or else the error that was being handled when it occurred, and so on."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def require(module: str, package: str, extra: str = "eval") -> ModuleType:
    """Import a package of an optional extra. The error names the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this requires {package} ({error}): install it with `bash scripts/setup.sh {extra}`"
        ) from error


def package_folder(module: str, package: str, extra: str) -> Path:
    """Return the folder of an installed package of an optional extra, without importing it."""
    found = importlib.util.find_spec(module)
    if found is None:
        raise UserError(f"this requires {package}: install it with `bash scripts/setup.sh {extra}`")
    return Path(found.submodule_search_locations[0])


def require_librosa() -> ModuleType:
    """Import librosa and compile its vectorised functions that are used here, in one process at a time.

    The functions are compiled into a cache on first import. Two concurrent processes would corrupt this cache, after
    which every import causes a segmentation fault (numba issue 10128).
    """
    librosa = require("librosa", "librosa")
    with FileLock(Path(tempfile.gettempdir()) / f"librosa-{os.getuid()}.lock"):
        _ = librosa.pyin, librosa.feature.melspectrogram  # librosa imports its modules lazily
    return librosa


class SkippedClips:
    """The skipped clips of the data set `source`, which has `total` clips."""

    def __init__(self, source: object, total: int) -> None:
        self.source = source
        self.total = total
        self.keys: set[str] = set()

    def warn(self, key: str, reason: object) -> None:
        """Print on standard error, once per clip, that a clip is skipped."""
        if key not in self.keys:
            self.keys.add(key)
            count = f"{len(self.keys)} of {self.total} so far"
            print(printable(f"{self.source}: clip {key} is left out ({count}): {reason}"), file=sys.stderr)


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` as a command. A `UserError` is printed as one line on standard error with exit code 2. Ctrl-C exits
    with 130, a closed output pipe with 141, and SIGTERM with 143.
    """
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see `scripts.environment`
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes temporary files
    with suppress(AttributeError):  # not every stream is a file, and file names need not be valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            code = main()
        except SystemExit as leaving:
            code = leaving.code
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        code = 2
    except BrokenPipeError:
        output = select.poll()
        output.register(1, select.POLLOUT)
        if any(event & select.POLLERR for _, event in output.poll(0)):  # the reader has closed the pipe, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes again at exit
            code = 141
        else:
            traceback.print_exc()
            code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    exit_process(code or 0)


def exit_process(code: int) -> NoReturn:
    """Exit this process. With several processes, exit immediately, as gloo's threads outlive `shutdown`."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
