"""Stored numbers of Resemblyzer's partial utterances, through the installed package."""

from pathlib import Path

import pytest

import tests.golden.runners.voices  # noqa: F401
from tests.golden.check import check
from tests.golden.runners import load_case

GOLDEN = Path(__file__).parents[1] / "golden" / "conditions"


def test_partial_utterances():
    pytest.importorskip("resemblyzer")
    case = load_case(GOLDEN / "ge2e_slices.safetensors")
    assert all(r.passed for r in check(case))
    case.outputs["rows"][3, 4] += 1
    assert not all(r.passed for r in check(case))
