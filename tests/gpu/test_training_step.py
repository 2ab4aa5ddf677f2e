"""A training step on a CUDA device that is not there: the trainer reads one value per part from it."""

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from engine.training.tracking import Window
from engine.training.trainer import Trainer
from tests.engine.toy_task import CONFIG, ToyGAN, ToySet
from tests.gpu.fakes import CUDA, fake_cuda, faked


def fill_gradients(loss, parameters):
    """In place of the backward pass, which CUDA tensors without a driver do not have."""
    assert loss.device == CUDA and loss.requires_grad
    for p in parameters:
        p.grad = torch.empty_like(p)


class Reading(ToyGAN):
    """Reads its loss, as a careless task would."""

    def forward(self, batch, part):
        losses = super().forward(batch, part)
        losses["loss"].item()
        return losses


def step(task, tmp_path, **changes):
    data = ToySet()
    batches = [{"x": torch.zeros(4, 4)}] * 2
    with fake_cuda() as operators:
        task = faked(task).train()
        with (
            mock.patch("engine.training.trainer.pick_device", lambda name: CUDA),
            mock.patch("torch.nn.Module.to", lambda self, *_: self),
            mock.patch("torch.cuda.get_device_name", lambda *_: "none"),
            mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
            mock.patch.object(Trainer, "_stop_unless_finite"),  # the value that it reads
            mock.patch("torch.Tensor.backward", lambda loss: fill_gradients(loss, task.parameters())),
        ):
            trainer = Trainer(task, data, CONFIG | {"precision": "bf16"} | changes, tmp_path)
            operators.counts.clear()
            trainer._train_step(iter(faked(batches)), Window())
    return operators


def test_a_step_synchronises_only_to_check_the_gradient(tmp_path):
    operators = step(ToyGAN(), tmp_path)
    assert operators.counts["_fused_adamw_"] == 4 and operators.counts["_local_scalar_dense"] == 0
    assert operators.types["addmm", torch.bfloat16] > 0 and operators.types["addmm", torch.float32] == 0


def test_a_task_that_synchronises_is_detected(tmp_path):
    with pytest.raises(DataDependentOutputException):
        step(Reading(), tmp_path)
