"""The recipes named after the papers have the values that the papers state; tests/paper_values.yaml lists them."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from engine.config import load

TABLE = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("paper_values.yaml")))
CASES = [
    pytest.param(recipe, row, id=f"{recipe} {row['setting']}") for recipe in TABLE for row in TABLE[recipe]["values"]
]


@pytest.fixture(scope="module")
def composed():
    """Return each recipe, composed once."""
    return {recipe: load("train", [f"experiment={recipe}", *about["words"]]) for recipe, about in TABLE.items()}


@pytest.mark.parametrize(("recipe", "row"), CASES)
def test_a_recipe_has_what_its_paper_states(composed, recipe, row):
    value = OmegaConf.select(composed[recipe], row["setting"], throw_on_missing=True)
    value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    assert value == row["value"], f"section {row['section']}: {row['states']}"
