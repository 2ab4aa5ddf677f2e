"""The tests of tests/gpu, on tensors without data and on real cards: which passed, which were skipped.

With two GPUs everything runs: training steps of every task, sampling, resuming, DDP and FSDP2 over NCCL, and a run that
goes on after one of its processes was killed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from engine.config import CONFIGS
from engine.errors import UserError

LEAST: dict[str, float] = {}
ROOT = CONFIGS.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="run the tests whose names match this expression of pytest's -k")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", f"--junitxml={report}", "-k", args.only]
        code = subprocess.run(command, cwd=ROOT).returncode
        if not report.is_file():
            raise UserError(f"pytest ended with exit code {code} and no report: is it installed (setup.sh dev)?")
        cases = list(ElementTree.parse(report).iter("testcase"))
    results: dict[str, Any] = {"cards": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}
    results |= {"passed": [], "failed": [], "skipped": {}}
    for case in cases:
        name, skipped = f"{case.get('classname', '').split('.')[-1]}.{case.get('name')}", case.find("skipped")
        if skipped is not None:
            results["skipped"][name] = skipped.get("message", "")
        else:
            failed = case.find("failure") is not None or case.find("error") is not None
            results["failed" if failed else "passed"].append(name)
    counts = ", ".join(f"{len(results[kind])} {kind}" for kind in ("passed", "failed", "skipped"))
    yield results, f"{len(results['cards'])} GPUs: {counts}"
    if results["failed"]:
        raise UserError(f"{len(results['failed'])} tests failed: {', '.join(results['failed'])}")
