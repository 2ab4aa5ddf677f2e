"""Stored numbers of the official Talker-T2AV's parts and training forward (tests/golden/talker)."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import tests.golden.runners.talker  # noqa: F401
from talker_t2av.model import TalkerConfig, TalkerT2AV
from tests.golden.check import check
from tests.golden.runners import load_case

FOLDER = Path(__file__).parents[1] / "golden" / "talker"
CASES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
CONFIGS = Path(__file__).parents[2] / "configs" / "model"


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    results = check(load_case(FOLDER / f"{name}.safetensors"))
    assert results
    assert all(r.passed for r in results), [r for r in results if not r.passed]


@pytest.mark.parametrize(("name", "output"), [("cfm_sample_release", "x"), ("llm_forward_tts_only", "loss_total")])
def test_a_wrong_number_fails(name, output):
    case = load_case(FOLDER / f"{name}.safetensors")
    case.outputs[output] = case.outputs[output] * (1 + 1e-4)
    assert [r.output for r in check(case) if not r.passed] == [output]


def test_the_released_size_has_the_released_keys_and_shapes():
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / "talker_t2av_base.yaml"))
    with torch.device("meta"):
        model = TalkerT2AV(TalkerConfig(**config))
    expected = json.loads((FOLDER / "talker_full.keys.json").read_text())
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
    assert sum(p.numel() for p in model.parameters()) == 912_301_128
    model.load_state_dict({key: torch.empty(shape, device="meta") for key, shape in expected.items()}, assign=True)


def test_the_default_config_is_the_released_one():
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / "talker_t2av_base.yaml"))
    assert TalkerConfig(**config) == TalkerConfig(llm=config["llm"])
