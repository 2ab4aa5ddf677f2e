"""Options of `test_cases.py`, and the lines that `scripts/check_golden.py` prints.

python -m pytest tests/golden/test_cases.py [--golden DIR ...] [--golden-only PREFIX]
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

VERDICTS = ("pass", "FAIL", "not built")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("golden")
    group.addoption(
        "--golden", action="append", type=Path, metavar="DIR", help="folder of cases (default: those in git)"
    )
    group.addoption("--golden-only", default="", metavar="PREFIX", help="only cases whose name starts with PREFIX")
    group.addoption("--golden-lines", choices=("all", "failed"), help="print one line a case, and a summary")


def pytest_configure(config: pytest.Config) -> None:
    shown = config.getoption("--golden-lines", None)
    if shown:
        config.pluginmanager.register(Lines(quiet=shown == "failed"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        folders = metafunc.config.getoption("--golden", None) or [Path(__file__).parent]
        prefix = metafunc.config.getoption("--golden-only", "")
        files = [file for folder in folders for file in sorted(folder.rglob("*.safetensors"))]
        files = [file for file in files if file.stem.startswith(prefix)]
        metafunc.parametrize("golden_file", files, ids=lambda file: file.stem)


class Lines:
    """Prints what `test_case` records, in place of pytest's own report."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.counts = quiet, Counter()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            print(report.longreprtext, file=sys.stderr)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        told = dict(report.user_properties)
        self.counts[told["verdict"]] += 1
        if told["verdict"] != "pass" or not self.quiet:
            print(told["line"], flush=True)
        if told["broke"]:
            print(report.longreprtext, file=sys.stderr, flush=True)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        passed, failed, not_built = (self.counts[verdict] for verdict in VERDICTS)
        print(f"{passed} passed, {failed} failed, {not_built} not built")
        if failed or not_built:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
