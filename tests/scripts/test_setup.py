"""setup.sh refuses an unknown extra before it installs anything, however the extras are separated."""

import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / "scripts" / "setup.sh"


@pytest.mark.parametrize("words", [["nosuch"], ["dev", "nosuch"], ["dev,nosuch"], ["dev nosuch"]])
def test_an_unknown_extra_is_one_line_and_exit_code_2(words):
    done = subprocess.run(["bash", SETUP, *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: there is no extra nosuch; choose from") and done.stderr.count("\n") == 1
