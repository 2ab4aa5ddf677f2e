"""setup.sh refuses unknown extras, and all extras resolve together under constraints.txt."""

import hashlib
import json
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("extras_resolved.json")
PIP = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "-c", "constraints.txt"]


@pytest.mark.parametrize("words", [["nosuch"], ["dev", "nosuch"], ["dev,nosuch"], ["dev nosuch"]])
def test_unknown_extra_is_refused_in_one_line_with_exit_code_2(words):
    done = subprocess.run(["bash", ROOT / "scripts" / "setup.sh", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: there is no extra nosuch; choose from") and done.stderr.count("\n") == 1


def test_all_extras_resolve_together_to_the_versions_of_constraints(tmp_path):
    """Every set of extras then resolves, as the versions that suit all of them suit some of them.

    pip takes minutes, so its answer is kept for as long as the requirements and constraints stay as they are.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = (ROOT / "constraints.txt").read_text()
    wanted = [project[name] for name in ("requires-python", "dependencies", "optional-dependencies")]
    digest = hashlib.sha256(json.dumps([*wanted, constraints]).encode()).hexdigest()[:16]
    if json.loads(RECORD.read_text())["digest"] == digest:
        return
    probe = subprocess.run([*PIP, "--no-deps", "--retries=0", "einops"], cwd=ROOT, capture_output=True)
    if probe.returncode:
        pytest.skip("requirements or constraints have changed, and no package index answers to resolve them")
    report = tmp_path / "report.json"
    extras = ",".join(project["optional-dependencies"])
    done = subprocess.run([*PIP, f"--report={report}", f".[{extras}]"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    packages = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    found = {f"{package['name']}=={package['version']}".lower().replace("_", "-") for package in packages}
    lacking = found - set(constraints.lower().replace("_", "-").split())
    lacking = {name for name in lacking if not name.startswith(("speaking-faces==", "setuptools=="))}
    assert not lacking, "constraints.txt lacks these"
    RECORD.write_text(json.dumps({"digest": digest, "resolved": str(date.today()), "packages": len(found)}) + "\n")
