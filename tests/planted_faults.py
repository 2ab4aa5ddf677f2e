"""Plant faults of one line, one at a time, and name the test that notices each.

    python -m tests.planted_faults            # all of them, some ten minutes on two cores
    python -m tests.planted_faults 3 17       # those numbers

Every fault is planted in a copy of the tracked files; the working tree is not touched. The exit code is 1 if a fault is
not noticed, or if its line is no longer in the code. A change that rewrites a line of the table rewrites its row.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def copy_tree(folder: Path) -> None:
    """Copy the tracked files to `folder`, beside which the virtual environment is found by its link."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        target = folder / name
        if (ROOT / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    (folder / ".venv").symlink_to(ROOT / ".venv")


def plant(folder: Path, file: str, line: str, fault: str, tests: str) -> str:
    """Return the name of the first test that fails with a fault; an empty string if none does.

    Args:
        line, fault: a fragment of the file that occurs once, and what replaces it.
        tests: that should notice.

    Raises:
        LookupError: If the line is missing or occurs twice, or no test is named.
    """
    path = folder / file
    text = path.read_text()
    if text.count(line) != 1:
        raise LookupError(f"{file} has {line!r} {text.count(line)} times")
    path.write_text(text.replace(line, fault))
    environment = os.environ | {"PYTHONPATH": f"{folder}:{folder / 'codecs'}"}
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", "-p", "no:cacheprovider", *tests.split()]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    finally:
        path.write_text(text)
    broken = re.search(r"^ERROR (\S+\.py)(?: - .*)?$", done.stdout, re.MULTILINE)
    if broken or done.returncode in (4, 5):
        raise LookupError(f"{broken[1]} cannot be collected" if broken else f"{tests} names no test")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else f"the end of pytest, {done.returncode}" if done.returncode else ""


def main() -> int:
    faults = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    chosen = [int(word) for word in sys.argv[1:]] or range(1, len(faults) + 1)
    caught = 0
    with tempfile.TemporaryDirectory() as name:
        copy_tree(Path(name))
        for number in chosen:
            fault = faults[number - 1]
            try:
                test = plant(Path(name), **fault)
                result = f"caught by {test}" if test else "NOT CAUGHT"
            except LookupError as error:
                test = ""
                result = f"OUTDATED, {error}"
            print(f"{number:2} {result}: {fault['file']}: {fault['fault'].strip()}", flush=True)
            caught += bool(test)
    print(f"{caught} of {len(chosen)} faults are caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
