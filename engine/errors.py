"""Lines for people: the error type that becomes one line and exit code 2, missing packages, clips that are left out."""

from __future__ import annotations

import importlib
import os
import select
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from filelock import FileLock


class UserError(ValueError):
    """A mistake in what the user gave. The message names the offending value and says what to do about it."""


def printable(text: object) -> str:
    """Return one line of `text`; characters that control a terminal, such as escapes, become question marks."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def require(module: str, package: str, extra: str = "eval") -> ModuleType:
    """Import a package that only an extra installs; an error says which one."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this needs {package} ({error}): install it with  bash scripts/setup.sh {extra}") from error


def require_librosa() -> ModuleType:
    """Import librosa with those of its vectorised functions that are used here, one process at a time.

    They are compiled when they are imported for the first time after an installation, into a cache that two
    processes at once leave broken: every later import then ends in a segmentation fault (numba issue 10128).
    """
    librosa = require("librosa", "librosa")
    with FileLock(Path(tempfile.gettempdir()) / f"librosa-{os.getuid()}.lock"):
        _ = librosa.pyin, librosa.feature.melspectrogram  # librosa imports its modules as they are named
    return librosa


def leaving_out(source: object, total: int) -> Callable[[str, object], None]:
    """Return what says, once per clip, that a clip of the data set `source` of `total` clips cannot be used, and
    why."""
    return partial(_leave_out, set(), source, total)


def _leave_out(said: set[str], source: object, total: int, key: str, reason: object) -> None:
    if key not in said:
        said.add(key)
        count = f"{len(said)} of {total} so far"
        print(printable(f"{source}: clip {key} is left out ({count}): {reason}"), file=sys.stderr)


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run `main`; a `UserError` becomes one line on standard error and exit code 2, Ctrl-C becomes 130, a reader of the
    output that has ended 141.
    """
    with suppress(AttributeError):  # a stream that is not a file; names of files need not be text
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
        if any(event & select.POLLERR for _, event in output.poll(0)):  # what read it has ended, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more at its end
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
    """End this process: at once if it is one of several, as gloo's threads outlive `shutdown`."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
