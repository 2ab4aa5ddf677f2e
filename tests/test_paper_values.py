"""The recipes of the papers have the values of tests/paper_values.yaml, which the papers state."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from engine.config import load
from talker_t2av.model import TalkerConfig

TABLE = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("paper_values.yaml")))
CASES = [
    pytest.param(recipe, row, id=f"{recipe} {row['setting']}") for recipe in TABLE for row in TABLE[recipe]["values"]
]


@pytest.fixture(scope="module")
def composed():
    """Return each recipe, composed once."""
    return {recipe: load("train", [f"experiment={recipe}", *about["words"]]) for recipe, about in TABLE.items()}


@pytest.mark.parametrize(("recipe", "row"), CASES)
def test_a_recipe_has_the_value_of_its_paper(composed, recipe, row):
    value = OmegaConf.select(composed[recipe], row["setting"], throw_on_missing=True)
    value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    assert value == row["value"], f"section {row['section']}: {row['states']}"


@pytest.mark.parametrize("setting", ["delay=1", "order=av", "order=va"])
def test_ablations_of_the_talker_reach_model_and_data(setting):
    words = ["experiment=talker_paper", *TABLE["talker_paper"]["words"], f"task.model.{setting}"]
    config = load("train", words)
    model = TalkerConfig(**OmegaConf.to_container(config.task.model, resolve=True))
    assert (config.data.train.delay, config.data.train.order) == (model.delay, model.order) != (0, "add")
