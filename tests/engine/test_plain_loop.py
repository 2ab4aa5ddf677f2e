"""The trainer against a plain loop over the same batches, to rounding; the averages of its weights in closed form."""

import math

import pytest
import torch
from torch import nn
from toy_task import CONFIG, ToyBlocks, ToySet, read_lines

from engine.seeding import generator_for, seed_for
from engine.training.ema import ExponentialMovingAverage
from engine.training.settings import TrainerConfig
from engine.training.trainer import Trainer

STEPS = 12
BATCH = 4
ACCUMULATE = 2
LR = 1e-2
WARMUP = 5
SETTINGS = CONFIG | {"steps": STEPS, "validate_every": 100, "checkpoint_every": 100, "clip": 1.0}


def batches(data):
    """Each epoch in its own order, cut into batches one after the other; a sample's noise goes by its place."""
    epoch = 0
    order = []
    place = 0
    while True:
        samples = []
        for _ in range(BATCH):
            if not order:
                order = torch.randperm(len(data), generator=generator_for(0, "epoch", epoch)).tolist()
                epoch += 1
            samples.append(data.load(order.pop(0), generator_for(0, "sample", place)))
            place += 1
        yield {"x": torch.stack(samples)}


def plain_loop():
    """(losses of each step and part, the task after it)."""
    torch.manual_seed(0)
    task = ToyBlocks().train()
    coming = batches(ToySet())
    losses = []
    optimisers = {}
    for part, module in task.parts().items():
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1}]
        groups += [{"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
        optimisers[part] = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99))
    for step in range(STEPS):
        inputs = [next(coming) for _ in range(ACCUMULATE)]
        found = {}
        progress = (step - WARMUP) / (STEPS - WARMUP)
        lr = LR * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
        lr = LR * (step + 1) / WARMUP if step < WARMUP else lr
        for part, optimiser in optimisers.items():
            task.zero_grad()
            total = 0.0
            for micro, batch in enumerate(inputs):
                torch.manual_seed(seed_for(0, "step", "discriminator", step * ACCUMULATE + micro))
                loss = task(dict(batch), part)["loss"] / ACCUMULATE
                loss.backward()
                total += loss.item()
            mine = [p for g in optimiser.param_groups for p in g["params"]]
            apart = {id(p) for module in task.separate_clip_groups() for p in module.parameters()}
            for chosen in (True, False):
                torch.nn.utils.clip_grad_norm_([p for p in mine if (id(p) in apart) == chosen], 1.0)
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
            found[part] = total
        losses.append(found)
    return losses, task


def test_losses_and_weights_are_those_of_a_plain_loop(tmp_path):
    wanted, task = plain_loop()
    torch.manual_seed(0)
    trainer = Trainer(ToyBlocks(), ToySet(), TrainerConfig(**SETTINGS), tmp_path)
    trainer.fit()
    lines = read_lines(tmp_path / "log.jsonl")
    found = [{part: line[f"{part}/loss"] for part in wanted[0]} for line in lines if "lr" in line]
    assert len(found) == STEPS and found[0] != found[-1]
    for one, two in zip(found, wanted):
        assert one == pytest.approx(two, rel=1e-6)
    for (name, one), two in zip(trainer.task.named_parameters(), task.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7, msg=name)


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
