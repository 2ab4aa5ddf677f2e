"""Wrong numbers are seen in every area, and the command says what it was given wrongly."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.errors import UserError
from scripts import check_golden
from tests.golden.check import check
from tests.golden.compare_runs import differences
from tests.golden.runners import load_case

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PLANTED = {  # case -> output
    "codecs/wxvae_oddstride": "encode_147",
    "conditions/sedd_dse_n7_f32": "entropy",
    "talker/cfm_sample_release": "x",
    "talker_generation/dataset_delay_cut": "batch.input_ids",
}
SCALED = {
    **PLANTED,
    "codecs/mgct_small_encoder": "z",
    "conditions/wavlm_padded": "hidden_states",
    "conditions/syncnet_offset": "lse_d",
    "talker/llm_forward_tts_only": "loss_total",
    "talker_generation/gen_infer_longprefix": "h",
}


def copy(case: str, folder: Path) -> Path:
    """The case's file in `folder`, with the recipe of its weights."""
    folder.mkdir(exist_ok=True)
    for path in (FOLDER / "weights.py", FOLDER / f"{case}.safetensors", FOLDER / f"{case}.keys.json"):
        shutil.copy(path, folder)
    return folder / f"{Path(case).name}.safetensors"


def change_one_number(path: Path, output: str) -> None:
    """The largest float grows by a thousandth, the first integer by one."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    values = tensors[f"out.{output}"].flatten()
    if values.is_floating_point():
        values[values.abs().argmax()] *= 1.001
    else:
        values[0] += 1
    save_file(tensors, path, metadata)


def test_one_wrong_number_in_each_area_fails_in_the_command(tmp_path):
    for case, output in PLANTED.items():
        change_one_number(copy(case, tmp_path / "wrong"), output)
    copy("conditions/epfg_n7", tmp_path / "right")
    alien = copy("conditions/sedd_noise_f32", tmp_path / "right")
    alien.rename(alien.with_name("alien.safetensors"))
    alien.with_suffix(".keys.json").rename(alien.with_name("alien.keys.json"))
    command = [sys.executable, "scripts/check_golden.py", tmp_path / "wrong", tmp_path / "right"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and not done.stderr
    *lines, summary = done.stdout.splitlines()
    assert summary == "1 passed, 4 failed, 1 not built"
    for case, output in PLANTED.items():
        line = next(line for line in lines if Path(case).name in line)
        assert line.startswith("FAIL       ") and f"; {output} off by " in line
        assert line.count(" off by ") == 1, line
    assert "not built  alien: no runner for this component yet" in lines
    right = next(line for line in lines if "epfg_n7" in line)
    assert right.startswith("pass       epfg_n7: abs ") and "13 outputs" in right


@pytest.mark.parametrize(("of_pytest", "code"), [(0, 0), (5, 1)])
def test_options_reach_pytest_and_its_exit_code_the_user(monkeypatch, of_pytest, code):
    def run(command, cwd, env):
        assert cwd == ROOT and not env["PYTEST_ADDOPTS"]
        assert command[-4:-1] == ["epfg", "--golden-lines", "failed"]
        assert command[-1] == f"--golden={FOLDER / 'conditions'}"
        return subprocess.CompletedProcess(command, of_pytest)

    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(sys, "argv", ["check_golden.py", "conditions", "--only", "epfg", "--quiet"])
    assert check_golden.main() == code


DAMAGE = {  # what happens to a case and its list of keys, and the line
    "junk": (lambda case, keys: case.write_bytes(b"junk"), "epfg_n7"),
    "cut": (lambda case, keys: case.write_bytes(case.read_bytes()[:-8]), "epfg_n7"),
    "no meta": (lambda case, keys: save_file(load_file(case), case), "epfg_n7"),
    "bad keys": (lambda case, keys: keys.write_text('{"weight": [3, '), "epfg_n7"),
    "no keys": (lambda case, keys: keys.unlink(), "epfg_n7"),
    "no case": (lambda case, keys: case.unlink(), "no case"),
    "no folder": (lambda case, keys: shutil.rmtree(case.parent), "no such folder"),
}


@pytest.mark.parametrize(("damage", "line"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_or_missing_case_is_named_in_one_line(tmp_path, monkeypatch, damage, line):
    path = copy("conditions/epfg_n7", tmp_path / "cases")
    damage(path, path.with_suffix(".keys.json"))
    monkeypatch.setattr(sys, "argv", ["check_golden.py", str(tmp_path / "cases")])
    with pytest.raises(UserError, match=line):
        check_golden.main()


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


def test_runs_are_compared_case_by_case():
    numbers = "abs 1.00e-06 rel 2.00e-06 floor 0.0e+00 (x), 2 outputs"
    before = f"pass       a: {numbers}, 0.1 s\n1 passed, 0 failed, 0 not built"
    assert differences(before, before.replace("0.1 s", "9.9 s; y not compared: why")) == []
    worse = before.replace("1.00e-06", "1.01e-06")
    is_worse = f"a: is  pass {numbers.replace('1.00e-06', '1.01e-06')}"
    assert differences(before, worse) == [f"a: was pass {numbers}", is_worse]
    assert differences(before, before.replace("pass  ", "FAIL  "))[1] == f"a: is  FAIL {numbers}"
    assert differences(before, "") == [f"a: was pass {numbers}", "a: is  gone"]
