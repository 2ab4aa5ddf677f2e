"""Claims of Talker-T2AV put to the test: what the variants train with."""

from argparse import Namespace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from benchmarks.talker_claims import ORDERS, order_settings
from engine.config import compose
from talker_t2av.model import TalkerConfig


@pytest.mark.parametrize("order", ORDERS)
def test_variants_are_settings_of_the_recipe_with_equal_rows(order):
    args = Namespace(corpus=Path("c"), train_steps=7, overrides=["trainer.batch_size=3"])
    config = compose("train", order_settings(args, Path("s"), order, 2))
    model = TalkerConfig(**OmegaConf.to_container(config.task.model, resolve=True))
    assert (config.data.train.order, config.data.train.delay) == (model.order, model.delay)
    assert (config.trainer.steps, config.trainer.seed) == (7, 2)
    assert config.trainer.batch_size * len(config.data.train.tasks) == 6
    assert order == "add" or ORDERS[order]
