"""The one error type that a command line turns into a single line and exit code 2."""

from __future__ import annotations

import os
import select
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


class UserError(ValueError):
    """A mistake in what the user gave. The message names the offending value and says what to do about it."""


def printable(text: object) -> str:
    """Return one line of `text`; characters that control a terminal, such as escapes, become question marks."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def run_cli(main: Callable[[], int | None], leave: Callable[[int], None] = sys.exit) -> None:
    """Run `main`; a `UserError` becomes one line on standard error and exit code 2, Ctrl-C becomes 130, a reader of the
    output that has ended 141.

    `leave` ends the process with the exit code, whatever ended `main`.
    """
    with suppress(AttributeError):  # a stream that is no file; names of files need not be text
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
    leave(code or 0)


def exit_process(code: int) -> NoReturn:
    """End this process: at once if it is one of several, as gloo's threads outlive `shutdown`."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
