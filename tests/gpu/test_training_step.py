"""A training step on a fake CUDA device: the trainer reads one value per part, whether the gradient is finite."""

from unittest import mock

import pytest
import torch

from engine.training.tracking import Window
from engine.training.trainer import Trainer
from tests.engine.toy_task import CONFIG, ToyGAN, ToySet
from tests.gpu.fakes import CUDA, OutputTypes, audited, faked


class Reading(ToyGAN):
    """Reads its loss, as a careless task would."""

    def forward(self, batch, part):
        losses = super().forward(batch, part)
        losses["loss"].item()
        return losses


@pytest.mark.parametrize(("kind", "reads"), [(ToyGAN, 0), (Reading, 2)])
def test_a_step_reads_only_what_its_task_reads(tmp_path, kind, reads):
    """Without the check for finite gradients. PyTorch runs no backward pass of CUDA tensors without a driver."""
    checks = mock.Mock()
    with audited() as audit:
        task = faked(kind()).train()

        def fill_gradients(loss):
            assert loss.device == CUDA and loss.requires_grad
            for parameter in task.parameters():
                parameter.grad = torch.empty_like(parameter)

        with (
            mock.patch("engine.training.trainer.pick_device", lambda name: CUDA),
            mock.patch("torch.cuda.get_device_name", lambda *_: "none"),
            mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
            mock.patch.object(Trainer, "_stop_unless_finite", checks),
            mock.patch("torch.Tensor.backward", fill_gradients),
        ):
            trainer = Trainer(task, ToySet(), CONFIG | {"precision": "bf16"}, tmp_path)
            batches = iter(faked([{"x": torch.zeros(4, 4)}] * 2))
            audit.reads.clear()
            audit.waits.clear()
            with OutputTypes() as types:
                trainer._train_step(batches, Window())
    assert types.calls["addmm", torch.bfloat16] and not types.calls["addmm", torch.float32]
    assert all(optimiser.defaults["fused"] for optimiser in trainer.optimisers.values())
    assert checks.call_count == 2 and audit.reads.total() == reads * CONFIG["accumulate"] and not audit.waits
