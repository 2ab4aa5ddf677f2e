"""What low-rank adaptation refuses, and how updates are merged."""

import pytest
import torch
from toy_task import ToyGAN

from engine.errors import UserError
from engine.training.task import merged


class Adaptable(ToyGAN):
    def adapted(self):
        return self.generator


def test_merged_weights_are_those_of_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    task = Adaptable()
    plain = {k: v.clone() for k, v in task.generator.state_dict().items()}
    task.adapt(2, 6.0)
    for parameter in task.generator.parameters():
        torch.nn.init.normal_(parameter)
    ours = merged(task.generator.state_dict(), task.lora_scale)
    assert ours.keys() == plain.keys() and task.lora_scale == 3.0
    for module in task.generator.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.merge()
    theirs = {k.replace("base_layer.", ""): v for k, v in task.generator.state_dict().items() if "lora_" not in k}
    for key in plain:
        torch.testing.assert_close(ours[key], theirs[key])
    assert not any(p.requires_grad for p in task.discriminator.parameters())


def test_an_update_as_wide_as_the_layers_is_refused():
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"lora.rank=4 is as wide as every layer"):
        Adaptable().adapt(4, 1.0)
