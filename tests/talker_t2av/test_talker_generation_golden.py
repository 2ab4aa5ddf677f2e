"""Stored numbers of the official generation routines and training samples (tests/golden/talker_generation)."""

from pathlib import Path

import pytest

import tests.golden.runners.talker_generation  # noqa: F401
from tests.golden.check import check
from tests.golden.runners import load_case

FOLDER = Path(__file__).parents[1] / "golden" / "talker_generation"
CASES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    results = check(load_case(FOLDER / f"{name}.safetensors"))
    assert results
    assert all(r.passed for r in results), [r for r in results if not r.passed]


def test_a_wrong_number_fails():
    case = load_case(FOLDER / "gen_infer_longprefix.safetensors")
    case.inputs["speaker_emb"] = case.inputs["speaker_emb"] * 1.001
    assert not all(r.passed for r in check(case))
