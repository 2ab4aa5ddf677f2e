"""Wrong numbers are seen in cases of every kind."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scripts import check_golden
from tests.golden.check import check
from tests.golden.runners import load_case

FOLDER = Path(__file__).parent
SCALED = {  # case -> output: a formula, a network, integers, and a case that measured how it amplifies rounding
    "conditions/sedd_dse_n7_f32": "entropy",
    "codecs/mgct_small_encoder": "z",
    "talker_generation/dataset_delay_cut": "batch.input_ids",
    "talker/llm_forward_tts_only": "loss_total",
}


def copy(case: str, folder: Path) -> Path:
    """The case's file in `folder`, with the recipe of its weights."""
    folder.mkdir(exist_ok=True)
    for path in (FOLDER / "weights.py", FOLDER / f"{case}.safetensors", FOLDER / f"{case}.keys.json"):
        shutil.copy(path, folder)
    return folder / f"{Path(case).name}.safetensors"


def test_the_command_prints_a_line_a_case(tmp_path, monkeypatch, capfd):
    wrong = copy("conditions/sedd_dse_n7_f32", tmp_path / "wrong")
    with safe_open(wrong, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(wrong)
    tensors["out.entropy"].mul_(1.001)
    save_file(tensors, wrong, metadata)
    copy("conditions/epfg_n7", tmp_path / "right")
    alien = copy("conditions/sedd_noise_f32", tmp_path / "right")
    alien.rename(alien.with_name("alien.safetensors"))
    alien.with_suffix(".keys.json").rename(alien.with_name("alien.keys.json"))
    monkeypatch.setattr(sys, "argv", ["check_golden.py", str(tmp_path / "wrong"), str(tmp_path / "right")])
    assert check_golden.main() == 1
    printed = capfd.readouterr().out
    assert "1 passed, 1 failed, 1 not built" in printed.splitlines()
    assert printed.count(" off by ") == 1 and "; entropy off by" in printed
    assert printed.count(" not compared: ") == 6  # forms B and C of guidance, of three sets of scales


@pytest.mark.parametrize(("case", "output"), SCALED.items())
def test_an_output_that_is_a_thousandth_off_fails_alone(case, output):
    case = load_case(FOLDER / f"{case}.safetensors")
    value = case.outputs[output]
    case.outputs[output] = value * 1.001 if value.is_floating_point() else value + 1
    assert [result.output for result in check(case) if not result.passed] == [output]


def test_nan_fails_a_case():
    case = load_case(FOLDER / "conditions" / "sedd_noise_f32.safetensors")
    case.inputs["t"] = torch.full_like(case.inputs["t"], float("nan"))
    assert not any(result.passed for result in check(case))
