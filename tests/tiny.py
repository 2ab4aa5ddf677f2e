"""Sizes of tiny networks that several tests share, and a plain loop that trains a task."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.training.settings import TrainerConfig
from engine.training.task import Task
from engine.training.trainer import Trainer

HICODIT = {
    "codes": 16, "width": 32, "heads": 4, "low_blocks": 1, "high_blocks": 1, "cond_dim": 16, "lip_dim": 32,
    "face_dim": 16, "dropout": 0.0,
}  # fmt: skip
ENCODERS = {"lip_dim": 32, "lip_heads": 4, "face_dim": 16, "face_width": 4, "phonemes": 5}
RVQ = {
    "encoder_width": 4, "ratios": [3, 4, 5], "latent_channels": 12, "levels": 3, "codebook_size": 16,
    "codebook_dim": 4, "vocos_dim": 16, "vocos_intermediate": 24, "vocos_layers": 1, "n_fft": 180, "hop": 60,
}  # fmt: skip
WHISPERX_VAE = {
    "encoder_width": 2, "encoder_ratios": [12, 10, 4, 2], "hidden": 16, "latent_dim": 8, "decoder_width": 16,
    "decoder_ratios": [12, 10, 4, 2], "mel_bands": 20, "whisper_context": 20, "whisper_heads": 2,
    "whisper_layers": 1,
}  # fmt: skip
LIA_X = {"style_dim": 16, "motion_dim": 4, "scale": 1, "size": 32, "width": 4, "max_width": 8, "depth": 1}
DISCRIMINATORS = {
    "period": {"periods": [2, 3], "channels": 2, "max_channels": 4},
    "spectrogram": {"fft_sizes": [128], "channels": 2, "max_channels": 4},
}
TRAINER = asdict(TrainerConfig()) | {
    "steps": 20, "batch_size": 2, "lr": 3e-3, "warmup": 0, "schedule": "constant", "ema_decay": 0.9, "log_every": 1,
    "validate_every": 100, "checkpoint_every": 100,
}  # fmt: skip


def fit(task: Task, data: Any, run: Path, **changes: Any) -> tuple[dict[str, Tensor], list[float]]:
    """The trained state and the losses of all steps of a run of the trainer."""
    Trainer(task, data, TrainerConfig(**TRAINER | changes), run).fit()
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return task.state_dict(), [line["loss"] for line in lines if "loss" in line]


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def batch_of(data: Any, count: int | None = None) -> dict[str, Any]:
    """A batch of the first items of a training set, by default of all, each drawn with its own generator."""
    numbers = range(len(data) if count is None else count)
    return data.collate([data.load(i, torch.Generator().manual_seed(i)) for i in numbers])


def train(task: Task, batch: dict[str, Tensor], steps: int, whole: bool = False) -> list[dict[str, dict[str, Any]]]:
    """Losses by part of each step on one batch, from step 0 of the task's schedules on.

    whole: every trained parameter must have a gradient in every step, as distributed training needs it.
    """
    parts = task.train().parts()
    logs = []
    trained = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}
    optimisers = {name: torch.optim.AdamW(parameters, lr=5e-3) for name, parameters in trained.items()}
    for step in range(steps):
        task.begin_step(step)
        shared = dict(batch)
        losses = {}
        for part in parts:
            task.zero_grad(set_to_none=True)
            losses[part] = task(shared, part)
            losses[part]["loss"].backward()
            assert not whole or all(p.grad is not None for p in trained[part])
            optimisers[part].step()
        logs.append(losses)
    return logs
