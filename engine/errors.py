"""The one error type that a command line turns into a single line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress


class UserError(ValueError):
    """A mistake in what the user gave. The message names the offending value and says what to do about it."""


def run_cli(main: Callable[[], int | None], leave: Callable[[int], None] = sys.exit) -> None:
    """Run `main`; a `UserError` becomes one line on standard error and exit code 2, Ctrl-C becomes 130.

    `leave` ends the process with the exit code.
    """
    with suppress(AttributeError):  # a stream that is no file; names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
    except UserError as error:
        line = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))  # names may hold escapes
        print(f"error: {line}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    leave(code or 0)
