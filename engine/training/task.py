"""What a model brings to the trainer, and the settings of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine.errors import UserError
from engine.evaluation.shares import ALONE, ByClip, Share, figures_of
from engine.settings import NEEDED, SEEDS, check_settings, setting
from engine.training.lora import add_lora


@dataclass(frozen=True)
class Release:
    """What a release holds beside its weights.

    Attributes:
        kind: of the model; see `engine.release.Released`.
        config: its constructor arguments, and what else inference needs; JSON can hold it.
        module: name of the task's submodule that is released.
        title: of the card. about: what the model is, a sentence or two. usage: Python lines that load "FOLDER".
        left_out: tensors of the module that loading does not need.
        lora_scale: factor of low-rank updates, which are added to the weights they update; None: there are none.
    """

    kind: str
    config: dict[str, Any]
    module: str
    title: str
    about: str
    usage: str
    left_out: tuple[str, ...] = ()
    lora_scale: float | None = None


class Task(nn.Module):
    """What is trained: networks, losses, validation, and what a release of the result holds."""

    lora_scale: float | None = None  # of the low-rank updates that `adapt` added
    step = 0  # optimiser steps done, in every process alike
    on_host: tuple[str, ...] = ()  # entries of a batch that stay in main memory: lengths, which shapes depend on

    def parts(self) -> dict[str, nn.Module]:
        """Optimiser name -> module whose parameters it owns, in update order. A GAN: discriminator, generator."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Repeated modules with most of the weights and activations, none within another, used by calling them.

        The unit of sharding, compilation and activation checkpointing, where the trainer's settings ask for them.
        """
        return []

    def clipped_apart(self) -> list[nn.Module]:
        """Modules whose gradients are clipped by a norm of their own, so that they do not scale those of the others."""
        return []

    def has_idle_parameters(self) -> bool:
        """Whether some steps give no gradient to some parameters that are trained: DDP then looks for them."""
        return len(self.parts()) > 1

    def whole(self) -> list[nn.Module]:
        """Modules whose parameters `forward` changes in place, outside of `blocks`: they are never sharded."""
        return []

    def begin_step(self, step: int) -> None:
        """Called before each step of training; schedules go by `self.step`, which the host knows."""
        self.step = step

    def forward(self, batch: dict[str, Any], part: str) -> dict[str, Tensor]:
        """Losses of `part`, weighted: `loss` is what is minimised, the others (scalars) are logged.

        A result that the next part needs too may be stored in `batch`. It is there if a step has one batch; else it is
        made again, so that the graphs of all batches need not be kept. Random draws come from torch's default
        generator, which is seeded for every batch, and are made for such results or in the first part only. No value
        is read from the device: the host would wait for it. Parameters that are changed in place (code books) must
        change alike in every process: draw for that from a generator seeded by a buffer, as the default one differs.
        """
        raise NotImplementedError

    def tokens(self, batch: dict[str, Any]) -> int:
        """How many tokens (frames) a batch holds, for the log."""
        return 0

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Figures of merit, measured by this process alone; see `measure`."""
        return figures_of([self.measure(step, folder, ALONE)])

    def measure(self, step: int, folder: Path, share: Share) -> dict[str, float | ByClip]:
        """What this process contributes to a validation, in eval mode with averaged weights.

        Every process measures its share of the clips; what cannot be divided is measured by the first one. Processes do
        not wait for each other in here. A few fixed clips are written into `folder` as WAV, PNG and MP4 files, which
        trackers show.
        """
        return {}

    def release_info(self) -> Release | None:
        """What a release holds beside its weights; None: this task is not released. See `release_of`."""
        return None

    def release_of(
        self, module: str, title: str, about: str, usage: str, extra: dict[str, Any] | None = None
    ) -> Release:
        """The description of a release of the `Released` submodule `module`; `extra` joins its config."""
        network = self.get_submodule(module)
        left_out = tuple(sorted(network.state_dict().keys() - network.stored().keys()))
        config = network.arguments() | (extra or {})
        return Release(network.kind, config, module, title, about, usage, left_out, self.lora_scale)

    def release_files(self, folder: Path) -> None:
        """Write further files of a release (a tokenizer) into `folder`."""

    def adapted(self) -> nn.Module | None:
        """The module whose linear layers low-rank adaptation updates; None: this task has no such training."""
        return None

    def adapt(self, rank: int, alpha: float) -> None:
        """Train nothing but low-rank updates of the linear layers of `adapted`; see `engine.training.lora.add_lora`.

        Raises:
            UserError: the task has nothing to adapt, or as `add_lora` does.
        """
        module = self.adapted()
        if module is None:
            raise UserError(
                f"lora.rank={rank}: {type(self).__name__} has no low-rank training; use lora.rank=0 (all weights)"
            )
        self.requires_grad_(False)
        self.lora_scale = add_lora(module, rank, alpha)


@dataclass(frozen=True)
class TrainerConfig:
    """The fields of configs/trainer/*.yaml, where each is explained. Every field must be given."""

    steps: int = setting(NEEDED, 1, 10**9)
    batch_size: int = setting(NEEDED, 1, 10**6)
    batch_tokens: int | None = setting(NEEDED, 1, 10**9)
    by_length: bool
    accumulate: int = setting(NEEDED, 1, 10**6)
    global_batch_size: int | None = setting(NEEDED, 1, 10**9)
    lr: float = setting(NEEDED, 0.0, 10.0)
    betas: tuple[float, float] = setting(NEEDED, 0.0, 1 - 1e-9)
    weight_decay: float = setting(NEEDED, 0.0, 100.0)
    warmup: int = setting(NEEDED, 0, 10**9)
    schedule: str
    min_lr_ratio: float = setting(NEEDED, 0.0, 1.0)
    clip: float | None = setting(NEEDED, 1e-9, 1e9)
    ema_decay: float = setting(NEEDED, 0.0, 1 - 1e-9)
    precision: str
    device: str
    parallel: str
    checkpointing: bool
    compile: bool
    workers: int = setting(NEEDED, 0, 256)
    log_every: int = setting(NEEDED, 1, 10**9)
    validate_every: int = setting(NEEDED, 1, 10**9)
    checkpoint_every: int = setting(NEEDED, 1, 10**9)
    keep: int = setting(NEEDED, 1, 10**6)
    best: str | None
    spike: float | None = setting(NEEDED, 1e-9, 1e9)
    give_up_after: int = setting(NEEDED, 1, 10**9)
    seed: int = setting(NEEDED, *SEEDS)
    wandb: str
    tensorboard: bool
    peak_tflops: float | None = setting(NEEDED, 1e-9, 1e9)
    profile: int = setting(NEEDED, 0, 10_000)

    @classmethod
    def of(cls, values: Mapping[Any, Any]) -> TrainerConfig:
        """
        Raises:
            UserError: a field is missing, unknown or out of range.
        """
        try:
            return cls(**{str(key): value for key, value in values.items()})
        except TypeError as error:
            raise UserError(f"trainer config: {error}".replace("TrainerConfig.__init__()", "it")) from error

    def __post_init__(self) -> None:
        words = {
            "schedule": ("constant", "cosine"),
            "precision": ("fp32", "bf16"),
            "device": ("auto", "cpu", "cuda"),
            "parallel": ("ddp", "fsdp", "hybrid"),
            "wandb": ("off", "offline", "online"),
        }
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"trainer.{name}={getattr(self, name)} is unknown; choose {', '.join(allowed)}")
        check_settings(self, "trainer.")
        if len(self.betas) != 2:
            raise UserError(f"trainer.betas={self.betas} must be two numbers, as in [0.9,0.98]")
        if self.best is not None and not re.fullmatch(r"(min|max) \S+", self.best):
            raise UserError(f"trainer.best={self.best} is not `min NAME` or `max NAME`, as in 'min wer_seen'")

    def shared_among(self, processes: int) -> TrainerConfig:
        """With `global_batch_size`: batches of at most `batch_size` for each process, and as many of them as it takes.

        Raises:
            UserError: it cannot be divided so.
        """
        whole = self.global_batch_size
        if whole is None:
            return self
        if self.batch_tokens is not None:
            raise UserError(f"trainer.global_batch_size={whole} counts samples: set it or trainer.batch_tokens to null")
        each = whole // processes
        accumulate = -(-each // self.batch_size)
        if whole % processes or each % max(1, accumulate):
            raise UserError(
                f"trainer.global_batch_size={whole} cannot be shared by {processes} processes in equal batches of at "
                f"most trainer.batch_size={self.batch_size}: choose other numbers"
            )
        return replace(self, accumulate=accumulate, batch_size=each // accumulate)

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step` (from 0): linear warm-up, then constant or cosine to `min_lr_ratio`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine)
