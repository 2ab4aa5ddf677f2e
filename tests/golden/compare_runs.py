"""Two printouts of `scripts/check_golden.py`, compared case by case.

    python tests/golden/compare_runs.py BEFORE.txt AFTER.txt

Prints the cases whose verdict, errors or number of outputs differ; exit code 1 if there are any.
"""

from __future__ import annotations

import re
import sys
from itertools import chain
from pathlib import Path

LINE = re.compile(r"(pass|FAIL|not built) +([^ :]+): (.*)")
TIME_AND_NOTES = re.compile(r", \d+\.\d+ s\b.*")


def results(text: str) -> dict[str, str]:
    """Case -> verdict and numbers, without the time that it took and what follows."""
    found = [match.groups() for match in map(LINE.match, text.splitlines()) if match]
    return {name: f"{verdict} {TIME_AND_NOTES.sub('', rest)}" for verdict, name, rest in found}


def differences(before: str, after: str) -> list[str]:
    """Two lines for each case that is not as it was."""
    old, new = results(before), results(after)
    return list(
        chain.from_iterable(
            (f"{name}: was {old.get(name, 'absent')}", f"{name}: is  {new.get(name, 'gone')}")
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        )
    )


if __name__ == "__main__":
    texts = [Path(name).read_text() for name in sys.argv[1:]]
    lines = differences(*texts)
    print("\n".join(lines) or f"{len(results(texts[0]))} cases as before")
    sys.exit(bool(lines))
