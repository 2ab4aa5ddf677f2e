"""What low-rank adaptation refuses, and how updates are merged."""

import pytest
import torch
from toy_task import ToyGAN

import train
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


def test_random_weights_are_not_adapted(monkeypatch):
    words = [
        "name=toy",
        "task={_target_: tests.engine.toy_task.ToyGAN}",
        "data={train: {_target_: tests.engine.toy_task.ToySet}}",
        "lora.rank=8",
    ]
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    with pytest.raises(UserError, match=r"lora.rank=8 adapts a release: name it with init=FOLDER"):
        train.main()


def test_refusals_are_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"lora.rank=8: ToyGAN has no low-rank training"):
        ToyGAN().adapt(8, 1.0)
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"lora.rank=4 is as wide as every layer"):
        Adaptable().adapt(4, 1.0)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"needs PEFT .*setup.sh finetune"):
        Adaptable().adapt(2, 1.0)
