"""Reference numbers of the diffusion process and of guidance (tests/golden/conditions)."""

from pathlib import Path

import pytest
import torch

import scripts.golden.diffusion
import scripts.golden.guidance  # noqa: F401
from scripts.check_golden import check
from scripts.golden import load_case

CASES = sorted((Path(__file__).parent.parent / "golden" / "conditions").glob("*.safetensors"))
MINE = [path for path in CASES if path.stem.startswith(("sedd_", "epfg_"))]


@pytest.mark.parametrize("path", MINE, ids=lambda p: p.stem)
def test_case(path):
    results = check(load_case(path))
    assert results
    assert all(r.passed for r in results), [r for r in results if not r.passed]


def test_a_wrong_number_fails():
    case = load_case(next(p for p in MINE if p.stem == "sedd_dse_n7_f32"))
    case.outputs["entropy"] = case.outputs["entropy"] * (1 + 1e-3)
    assert not all(r.passed for r in check(case))


def test_nan_fails():
    case = load_case(next(p for p in MINE if p.stem == "sedd_noise_f32"))
    case.inputs["t"] = torch.full_like(case.inputs["t"], float("nan"))
    assert not any(r.passed for r in check(case))
