"""POSTER V2: the order of classes, positions of its attention."""

import torch

from hicodit.conditions.poster2 import CLASSES, POSTER2, CrossAttention
from hicodit.conditions.types import EXPRESSIONS
from tests.rehearsal.stand_ins import official


@torch.no_grad()
def test_classes_are_put_in_the_order_of_the_expressions():
    faces = torch.rand(1, 3, 96, 96)
    model = POSTER2.from_upstream(official("conditions/poster_v2_7"), CLASSES["raf"])
    own = model.logits(model.normalise(faces))
    given = model(faces)
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
        image = torch.randn(1, 9, 32)
        landmark = torch.zeros(1, 9, 32)
        value = attention.qkv(image)[..., 32:]
        out = attention(image, landmark)
    for row in range(3):
        for column in range(2):
            here = 3 * row + column
            assert torch.allclose(out[0, here], value[0, here + 1], atol=1e-5)
