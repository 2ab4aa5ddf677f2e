"""Settings of `train.py`, validated before PyTorch is imported and before data are generated or downloaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import UserError
from engine.settings import NEEDED, SEEDS, Group, Limits, group, setting


@dataclass(frozen=True)
class TrainerConfig(Group, prefix="trainer."):
    """Settings of the trainer."""

    steps: int = setting(1000, 1, 10**9, "number of optimiser steps of the run")
    batch_size: int = setting(16, 1, 10**6, "samples per micro-batch and process")
    by_length: bool = setting(False, about="batch samples of similar length")
    accumulate: int = setting(1, 1, 10**6, "micro-batches per step; global batch: batch_size x accumulate x processes")
    global_batch_size: int | None = setting(
        None, 1, 10**9, "samples per step over all processes, in micro-batches of at most batch_size; sets accumulate"
    )
    lr: float = setting(2e-4, 0.0, 10.0, "peak learning rate of AdamW")
    betas: tuple[float, float] = setting((0.9, 0.98), 0.0, 1 - 1e-9, "AdamW's betas")
    weight_decay: float = setting(
        0.01, 0.0, 100.0, "weight decay of AdamW for matrices; biases and gains are not decayed"
    )
    warmup: int = setting(100, 0, 10**9, "linear warm-up steps")
    schedule: str = setting(
        "cosine", choices=("constant", "cosine"), about="learning rate schedule after warm-up: cosine or constant"
    )
    min_lr_ratio: float = setting(0.1, 0.0, 1.0, "final learning rate of the cosine schedule as a fraction of lr")
    clip: float | None = setting(
        1.0, 1e-9, 1e9, "maximum gradient norm of each part, such as a GAN's two; null: no clipping"
    )
    ema_decay: float = setting(0.999, 0.0, 1 - 1e-9, "decay of the EMA weights, which are released; 0: no EMA")
    precision: str = setting("fp32", choices=("fp32", "bf16"), about="fp32, or bf16 for autocast")
    device: str = setting("cpu", choices=("auto", "cpu", "cuda"), about="cpu, cuda or auto")
    parallel: str = setting(
        "ddp",
        choices=("ddp", "fsdp", "hybrid"),
        about="data parallelism: ddp (copies), fsdp (shards), hybrid (shards within a machine)",
    )
    reshard_after_forward: bool = setting(
        True, about="fsdp and hybrid: free the gathered weights of a block after its forward pass; false: more memory"
    )
    reduce_each: bool = setting(
        False, about="fsdp and hybrid with accumulate: reduce the gradients of every micro-batch; true: less memory"
    )
    checkpointing: bool = setting(False, about="recompute the blocks' activations instead of storing them")
    compile: bool = setting(False, about="apply torch.compile to the blocks")
    workers: int = setting(0, 0, 256, "data loading processes of each training process")
    log_every: int = setting(20, 1, 10**9, "steps between log lines")
    validate_every: int = setting(500, 1, 10**9, "steps between validations")
    checkpoint_every: int = setting(500, 1, 10**9, "steps between checkpoints")
    keep: int = setting(2, 1, 10**6, "number of newest checkpoints to keep")
    best: str | None = setting(None, about="also keep the best checkpoint by a validation figure, e.g. 'min wer_seen'")
    sanity_validation: bool = setting(True, about="measure one clip per process before the first step")
    seed: int = setting(0, *SEEDS, "seed of initial weights, data order and noise")
    wandb: str = setting(
        "off",
        choices=("off", "offline", "online"),
        about="Weights & Biases mode: off, offline or online, in addition to log.jsonl",
    )
    tensorboard: bool = setting(False, about="write TensorBoard event files into RUN/tensorboard")
    peak_tflops: float | None = setting(
        None, 1e-9, 1e9, "peak TFLOP/s of the device for the MFU; null: the data sheet's bf16 peak of known GPUs"
    )
    profile: int = setting(0, 0, 10_000, "steps traced by torch.profiler into RUN/profile/, from the sixth on")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2:
            raise UserError(f"trainer.betas={self.betas} must be two numbers, as in [0.9,0.98]")
        if self.best is not None and not re.fullmatch(r"(min|max) \S+", self.best):
            raise UserError(f"trainer.best={self.best} is not `min NAME` or `max NAME`, such as 'min wer_seen'")

    def shared_among(self, processes: int) -> TrainerConfig:
        """Return the settings with `batch_size` and `accumulate` such that all processes together process
        `global_batch_size` samples.
        """
        whole = self.global_batch_size
        if whole is None:
            return self
        each = whole // processes
        accumulate = -(-each // self.batch_size)
        if whole % processes or each % max(1, accumulate):
            raise UserError(
                f"trainer.global_batch_size={whole} cannot be divided among {processes} processes in equal batches of "
                f"at most trainer.batch_size={self.batch_size}: choose other numbers"
            )
        return replace(self, accumulate=accumulate, batch_size=each // accumulate)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step (from 0): linear warm-up, then constant or cosine to `min_lr_ratio`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine)


@dataclass(frozen=True)
class LoRAConfig(Group, prefix="lora."):
    """Settings of low-rank adaptation."""

    rank: int = setting(0, 0, 2**14, "rank of the LoRA updates, merged into the release; 0: train all weights")
    alpha: float = setting(16.0, 1e-9, 1e9, "the LoRA updates are scaled by alpha / rank")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Group):
    """Settings of `train.py`. Those of task and data belong to the classes that `_target_` names there."""

    name: str = setting(NEEDED, about="name of the run; default: the experiment's name")
    run: str = setting("runs/${name}", about="folder of the run: checkpoints, log.jsonl, validation results, release")
    fresh: bool = setting(False, about="true: delete the run's checkpoints; false: resume from the last checkpoint")
    init: str | None = setting(None, about="release folder, or OWNER/NAME on the hub, with the initial weights")
    lora: LoRAConfig = group(LoRAConfig)
    limits: Limits = group(Limits, about="larger inputs are rejected before they are decoded")
    trainer: TrainerConfig = group(TrainerConfig)
    task: Any = setting(NEEDED)
    data: Any = setting(NEEDED)
