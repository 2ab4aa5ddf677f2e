"""Plant faults of one line, one at a time, and name the test that notices each.

    python -m tests.planted_faults            # all of them, some ten minutes on two cores
    python -m tests.planted_faults 3 17       # those numbers

Every fault is planted in a copy of the tracked files; the working tree is not touched. The exit code is 1 if a fault is
not noticed, or if its line is no longer in the code. A change that rewrites a line of the table rewrites its row.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """A fragment of a file that occurs once, what replaces it, and the tests that should notice."""

    file: str
    line: str
    fault: str
    tests: str


def copy_tree(folder: Path) -> None:
    """Copy the tracked files to `folder`, beside which the virtual environment is found by its link."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        target = folder / name
        if (ROOT / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    (folder / ".venv").symlink_to(ROOT / ".venv")


def plant(fault: Fault, folder: Path) -> str:
    """Return the name of the first test that fails with the fault; an empty string if none does.

    Raises LookupError where the line is missing or occurs twice, or no test is named.
    """
    path = folder / fault.file
    text = path.read_text()
    if text.count(fault.line) != 1:
        raise LookupError(f"{fault.file} has {fault.line!r} {text.count(fault.line)} times")
    path.write_text(text.replace(fault.line, fault.fault))
    environment = os.environ | {"PYTHONPATH": f"{folder}:{folder / 'codecs'}"}
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", "-p", "no:cacheprovider", *fault.tests.split()]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    finally:
        path.write_text(text)
    broken = re.search(r"^ERROR (\S+\.py)(?: - .*)?$", done.stdout, re.MULTILINE)
    if broken or done.returncode in (4, 5):
        raise LookupError(f"{broken[1]} cannot be collected" if broken else f"{fault.tests} names no test")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else f"the end of pytest, {done.returncode}" if done.returncode else ""


def main() -> int:
    faults = [Fault(**row) for row in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())]
    chosen = [int(word) for word in sys.argv[1:]] or range(1, len(faults) + 1)
    caught = 0
    with tempfile.TemporaryDirectory() as name:
        copy_tree(Path(name))
        for number in chosen:
            fault = faults[number - 1]
            try:
                test = plant(fault, Path(name))
                result = f"caught by {test}" if test else "NOT CAUGHT"
            except LookupError as error:
                test, result = "", f"OUTDATED, {error}"
            print(f"{number:2} {result}: {fault.file}: {fault.fault.strip()}", flush=True)
            caught += bool(test)
    print(f"{caught} of {len(chosen)} faults are caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
