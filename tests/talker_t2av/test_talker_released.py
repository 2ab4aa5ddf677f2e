"""Names, shapes and configuration of the released Talker-T2AV."""

import json
from pathlib import Path

import torch
from omegaconf import OmegaConf

from talker_t2av.model import TalkerConfig, TalkerT2AV

FOLDER = Path(__file__).parents[1] / "golden" / "talker"
CONFIGS = Path(__file__).parents[2] / "configs" / "model"


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
