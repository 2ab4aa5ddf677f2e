"""POSTER V2: released names, the order of classes, pictures of any size."""

import pytest
import torch

from engine.errors import UserError
from engine.official import rename_all
from hicodit.conditions.poster2 import CLASSES, POSTER2, RULES, CrossAttention
from hicodit.conditions.types import EXPRESSIONS
from tests.rehearsal.stand_ins import official


@pytest.fixture(scope="module")
def state():
    return official("conditions/poster_v2_7")


def test_names_are_the_released_ones_and_the_unused_are_left_out(state):
    model = POSTER2.from_released({f"module.{key}": value for key, value in state.items()}, EXPRESSIONS)
    own = model.state_dict()
    assert own.keys() == rename_all(state, RULES).keys() and len(own) < len(state)
    incomplete = {key: value for key, value in state.items() if key != "attn2.proj.bias"}
    with pytest.raises(UserError, match=r"attn2\.proj\.bias"):
        POSTER2.from_released(incomplete, EXPRESSIONS)


@torch.no_grad()
def test_classes_are_put_in_the_order_of_the_expressions(state):
    faces = torch.rand(1, 3, 96, 96)
    model = POSTER2.from_released(state, CLASSES["raf"])
    own, given = model.logits(model.normalise(faces)), model(faces)
    assert given.shape == (1, 7) and given.std() > 0
    for i, name in enumerate(CLASSES["raf"]):
        assert torch.allclose(given[:, EXPRESSIONS.index(name)], own[:, i], atol=1e-5)


def test_cross_attention_follows_the_bias_of_relative_positions():
    torch.manual_seed(0)
    attention = CrossAttention(32, 3)
    torch.nn.init.eye_(attention.proj.weight)
    torch.nn.init.zeros_(attention.proj.bias)
    with torch.no_grad():  # only "the image position one to the right of the asking one" is looked at
        attention.relative_position_bias_table.fill_(-1e4)
        attention.relative_position_bias_table[2 * 5 + 1] = 0.0  # rows equal, asking column - seen column = -1
        image, landmark = torch.randn(1, 9, 32), torch.zeros(1, 9, 32)
        value = attention.qkv(image)[..., 32:]
        out = attention(image, landmark)
    for row in range(3):
        for column in range(2):
            here = 3 * row + column
            assert torch.allclose(out[0, here], value[0, here + 1], atol=1e-5)
