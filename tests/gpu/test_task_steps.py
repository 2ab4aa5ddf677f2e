"""Losses of every task on a fake CUDA device: none of them waits for the device.

Lengths are on the host, as the trainer leaves them there (`Task.on_host`).
"""

import pytest
import torch

from tests.golden.golden_runs import RUNS
from tests.gpu.fakes import CUDA, audited, faked
from tests.tiny import batch_of
from whisperx_vae.latent_targets import LatentTargets

# Steps of the run, in which different losses count. RVQ: features and code books; a restart of dead codes and
# discriminators. WhisperX-VAE: a decoder of features; discriminators. LIA-X: guided motion codes, and free ones.
STEPS = dict.fromkeys([*RUNS, "talker_guided"], (0,)) | {"rvq_codec": (1, 2), "whisperx_vae": (0, 2), "lia_x": (0, 2)}


def made(name, folder):
    torch.manual_seed(0)
    task, data = RUNS["talker_t2av" if name == "talker_guided" else name](folder)
    if name == "talker_guided":
        task.guided_layers = (1,)
        collate = data.collate
        data.collate = lambda items: (batch := collate(items)) | {"pointer": batch["speech"][..., 0].long() * 0}
    if name == "whisperx_vae":
        task.targets = LatentTargets(8, 24_000, task.codec.hop)
        task.targets_until = 1
    return task, data


@pytest.mark.parametrize(("name", "step"), [(name, step) for name in STEPS for step in STEPS[name]])
def test_losses_do_not_synchronise(name, step, tmp_path):
    """Losses of all parts, as the trainer asks for them. Backward passes run in tests/gpu/test_cards.py."""
    task, data = made(name, tmp_path)
    with audited() as audit:
        fake = faked(task).train()
        # As the trainer gives it: some tensors stay on the host.
        batch = {k: v if k in task.on_host else faked(v) for k, v in batch_of(data).items()}
        fake.begin_step(step)
        for part in fake.parts():
            with torch.autocast("cuda", torch.bfloat16):
                losses = fake(batch, part)
            assert losses["loss"].device == CUDA and losses["loss"].ndim == 0
    assert not audit.reads and not audit.waits
