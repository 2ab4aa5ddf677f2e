"""Training steps of HiCoDiT and Talker-T2AV on a CUDA device that is not there: losses come without a host read.

Lengths are on the host, as the trainer leaves them there (`Task.on_host`).
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from engine.training.task import Task
from tests.golden.golden_runs import RUNS
from tests.gpu.fakes import CUDA, fake_cuda, faked


def batch_of(task, data):
    """The batch as the trainer gives it, its tensors on the fake device but for those that stay on the host."""
    batch = data.collate([data.__getitem__(i, torch.Generator()) for i in range(len(data))])
    return {k: v if k in task.on_host else faked(v) for k, v in batch.items()}


def take_step(task, data):
    """Losses of all parts, as the trainer asks for them; gives the operators that ran."""
    with fake_cuda(host=True) as operators:
        fake, batch = faked(task).train(), batch_of(task, data)
        operators.counts.clear()
        for part in fake.parts():
            with torch.autocast("cuda", torch.bfloat16):
                losses = fake(batch, part)
            assert losses["loss"].device == CUDA and losses["loss"].ndim == 0
    return operators


@pytest.mark.parametrize("name", ["hicodit", "talker_t2av", "talker_tts"])
def test_losses_wait_for_nothing(name, tmp_path):
    torch.manual_seed(0)
    operators = take_step(*RUNS[name](tmp_path))
    assert operators.waiting == 0 < operators.sent and sum(operators.counts.values()) > 50


@pytest.mark.parametrize("name", ["hicodit", "talker_t2av"])
def test_lengths_on_the_device_are_found(name, tmp_path, monkeypatch):
    """As these tasks had it once: the host then reads what shapes depend on."""
    task, data = RUNS[name](tmp_path)
    monkeypatch.setattr(type(task), "on_host", Task.on_host)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, AssertionError)):
        take_step(task, data)
