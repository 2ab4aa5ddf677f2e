import pytest
import torch
from torch import nn

from engine.training.ema import ExponentialMovingAverage


def test_the_decay_warms_up():
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = ExponentialMovingAverage(module, decay=0.25)
    expected = 0.0
    for count, weight in enumerate((1.0, -2.0, 3.0, 5.0)):
        nn.init.constant_(module.weight, weight)
        ema.update(count)
        decay = (1 / 10, 2 / 11, 3 / 12, 0.25)[count]
        expected = decay * expected + (1 - decay) * weight
        assert ema.averages["weight"].item() == pytest.approx(expected, rel=1e-6)
    with ema.swapped_in():
        assert module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert module.weight.item() == 5 and torch.is_grad_enabled()
