"""Training steps of every task on a CUDA device that is not there: losses come without a host read.

Lengths are on the host, as the trainer leaves them there (`Task.on_host`). The voice encoder's validation is here too.
"""

import copy
import shutil

import pytest
import torch

from engine.evaluation.validation import Share
from engine.media.audio import write_wav
from tests.golden.golden_runs import RUNS
from tests.gpu.fakes import CUDA, audited, fake_cuda, faked
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


def update(loss, module):
    """Backward pass and optimiser of a part."""
    loss.backward()
    trained = [p for p in module.parameters() if p.requires_grad]
    assert any(p.grad is not None for p in trained)
    torch.optim.AdamW(trained, fused=True).step()


def take_step(task, data, step=0, device=CUDA, use=lambda loss, module: None):
    """Losses of all parts, as the trainer asks for them, each given to `use`; gives the operators that ran."""
    with fake_cuda(device, host=True) as operators:
        fake = faked(task, device).train()
        # As the trainer gives it: some tensors stay on the host.
        batch = {k: v if k in task.on_host else faked(v, device) for k, v in batch_of(data).items()}
        if hasattr(task, "teacher"):  # it is not part of the task: it comes to the device in the first step
            fake.teacher = copy.copy(task.teacher)
            vars(fake.teacher).update({name: faked(value, device) for name, value in vars(task.teacher).items()})
        operators.counts.clear()
        fake.begin_step(step)
        for part, module in fake.parts().items():
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                losses = fake(batch, part)
            assert losses["loss"].device == torch.device(device) and losses["loss"].ndim == 0
            use(losses["loss"], module)
    return operators


@pytest.mark.parametrize(("name", "step"), [(name, step) for name in STEPS for step in STEPS[name]])
def test_losses_wait_for_nothing(name, step, tmp_path):
    operators = take_step(*made(name, tmp_path), step)
    assert operators.waiting == 0 and sum(operators.counts.values()) > 50


@pytest.mark.parametrize(("name", "step"), [(name, step) for name in STEPS for step in STEPS[name]])
def test_backward_passes_read_nothing(name, step, tmp_path):
    """Forward, backward and update on fake tensors of the processor, which the host cannot read either.

    On fake CUDA tensors PyTorch runs no backward pass: its engine starts a thread for each device that the driver
    names, and without a driver there is none. Copies between host and device are therefore seen in the forward pass
    only.
    """
    operators = take_step(*made(name, tmp_path), step, "cpu", update)
    assert operators.counts["_fused_adamw_"] > 0


def test_validation_of_the_voice_encoder_sends_its_clips_to_the_device(tmp_path):
    task, data = made("voice_encoder", tmp_path)
    for number in range(len(data)):
        write_wav(tmp_path / "train" / f"c{number}.wav", torch.zeros(8_000), 16_000)
    for split in ("seen", "unseen"):
        shutil.copytree(tmp_path / "train", tmp_path / split)
    with audited() as audit:
        faked(task).eval().measure(tmp_path, Share())
    assert audit.reads.total() == 3 * len(data)
