"""setup.sh refuses unknown extras, and all extras resolve together under constraints.txt."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "-c", "constraints.txt"]


@pytest.mark.parametrize("words", [["nosuch"], ["dev", "nosuch"], ["dev,nosuch"], ["dev nosuch"]])
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
