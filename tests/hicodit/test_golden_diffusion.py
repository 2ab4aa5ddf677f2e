"""Reference numbers of the diffusion process and of guidance (tests/golden/conditions)."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

import tests.golden.runners.diffusion
import tests.golden.runners.guidance  # noqa: F401
from tests.golden.check import check, main
from tests.golden.runners import load_case

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


def test_a_damaged_file_fails_and_the_others_run(tmp_path, monkeypatch, capsys):
    for suffix in (".safetensors", ".keys.json"):
        shutil.copy(CASES[0].parent / f"epfg_n7{suffix}", tmp_path)
    (tmp_path / "aaa.safetensors").write_bytes(b"junk")
    monkeypatch.setattr(sys, "argv", ["check_golden.py", str(tmp_path)])
    assert main() == 1
    text = capsys.readouterr().out
    assert "FAIL       aaa" in text and "pass       epfg_n7" in text and "1 passed, 1 failed, 0 not built" in text
