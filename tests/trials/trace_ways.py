"""Count what a command runs through: files, functions, lines, arrows between files, returns to a file already left.

    python -m tests.trials.trace_ways infer.py model=talker_t2av mode=tts output=/tmp/out
    python -m tests.trials.trace_ways --list infer.py

Only functions of this repository count, each at its first call; comprehensions, lambdas and class bodies do not.
`--list` prints the functions by file. Child processes are not traced.
"""

from __future__ import annotations

import inspect
import runpy
import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).resolve().parents[2]


def trace(program: str, arguments: list[str]) -> list[CodeType]:
    """Run a program and return the functions of this repository in the order of their first calls."""
    functions: dict[CodeType, None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        named = not code.co_name.startswith("<") and code.co_flags & inspect.CO_OPTIMIZED
        ours = code.co_filename.startswith(f"{ROOT}/") and "/.venv/" not in code.co_filename
        if event == "call" and named and ours:
            functions.setdefault(code)

    sys.argv = [program, *arguments]
    sys.path.insert(0, str((ROOT / program).parent))  # as Python does with a program
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    except SystemExit as end:
        print(f"exit code {end.code}")
    finally:
        sys.setprofile(None)
    return list(functions)


if __name__ == "__main__":
    words, listed = [word for word in sys.argv[1:] if word != "--list"], "--list" in sys.argv
    functions = trace(words[0], words[1:])
    files = [code.co_filename.removeprefix(f"{ROOT}/") for code in functions]
    steps = [(a, b) for a, b in pairwise(files) if a != b]
    returns = sum(b in files[: i + 1] for i, (a, b) in enumerate(pairwise(files)) if a != b)
    lines = sum(max(line or 0 for *_, line in code.co_lines()) - code.co_firstlineno + 1 for code in functions)
    for file in dict.fromkeys(files) if listed else ():
        print(f"{file}: {', '.join(code.co_qualname for code, f in zip(functions, files) if f == file)}")
    counts = f"{len(set(files))} files, {len(functions)} functions of {lines:,} lines"
    print(f"{counts}, {len(set(steps))} arrows between files, {returns} returns")
