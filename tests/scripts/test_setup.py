"""setup.sh refuses unknown extras."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("words", [["dev", "nosuch"], ["dev,nosuch"]])
def test_unknown_extra_is_refused_in_one_line_with_exit_code_2(words):
    done = subprocess.run(["bash", ROOT / "scripts" / "setup.sh", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: there is no extra nosuch; choose from") and done.stderr.count("\n") == 1
