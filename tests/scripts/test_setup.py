"""setup.sh refuses unknown extras, and all extras resolve together under constraints.txt."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "-c", "constraints.txt"]


@pytest.mark.parametrize("words", [["dev", "nosuch"], ["dev,nosuch"]])
def test_unknown_extra_is_refused_in_one_line_with_exit_code_2(words):
    done = subprocess.run(["bash", ROOT / "scripts" / "setup.sh", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: there is no extra nosuch; choose from") and done.stderr.count("\n") == 1


@pytest.mark.skipif("RESOLVE_EXTRAS" not in os.environ, reason="set RESOLVE_EXTRAS=1: pip resolves for minutes")
def test_all_extras_resolve_together_to_the_versions_of_constraints(tmp_path):
    """Every set of extras then resolves, as the versions that suit all of them suit some of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = (ROOT / "constraints.txt").read_text()
    probe = subprocess.run([*PIP, "--no-deps", "--retries=0", "einops"], cwd=ROOT, capture_output=True)
    if probe.returncode:
        pytest.skip("no package index answers")
    report = tmp_path / "report.json"
    extras = ",".join(project["optional-dependencies"])
    done = subprocess.run([*PIP, f"--report={report}", f".[{extras}]"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    packages = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    found = {f"{package['name']}=={package['version']}".lower().replace("_", "-") for package in packages}
    lacking = found - set(constraints.lower().replace("_", "-").split())
    lacking = {name for name in lacking if not name.startswith(("speaking-faces==", "setuptools=="))}
    assert not lacking, "constraints.txt lacks these"


def test_a_second_call_says_that_it_adds_extras(tmp_path):
    """With a stand-in for Python that makes no environment and installs nothing."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python"
    make = f'mkdir -p .venv/bin; ln -sf "{python}" .venv/bin/python; exit 0'
    python.write_text(
        f'#!/bin/sh\ncase "$1 $2" in "-m venv") {make};; "-m pip") exit 0;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)

    def set_up(*extras):
        call = ["bash", tmp_path / "scripts" / "setup.sh", *extras]
        return subprocess.run(call, capture_output=True, text=True, env=os.environ | {"PYTHON": str(python)}).stdout

    assert set_up().startswith("making .venv with Python 3")
    assert set_up("demo", "serve").startswith("adding demo,serve to .venv")
    assert set_up("demo", "serve") == ""
