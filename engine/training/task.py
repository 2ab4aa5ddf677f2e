"""What a model brings to the trainer, and low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685) of it by PEFT.

Of linear layers W becomes W + scale * B A with B (out, rank) zero at the start; only A (rank, in) and B learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine.errors import UserError, require
from engine.evaluation.validation import ByClip, Share


@dataclass(frozen=True)
class Release:
    """What a release holds beside its weights.

    Attributes:
        kind: of the model; see `engine.release.Pretrained`.
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
        """Return the module whose parameters each optimiser owns, by name, in update order; see `GANTask`."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Return repeated modules with most of the weights and activations, none within another, used by calling them.

        The unit of sharding, compilation and activation checkpointing, where the trainer's settings ask for them.
        """
        return []

    def clipped_apart(self) -> list[nn.Module]:
        """Return modules whose gradients are clipped by a norm of their own, and so do not scale the others."""
        return []

    def whole(self) -> list[nn.Module]:
        """Return modules whose parameters `forward` changes in place, outside of `blocks`: they are never sharded."""
        return []

    def begin_step(self, step: int) -> None:
        """Prepare a step of training; schedules depend on `self.step`, a number on the host."""
        self.step = step

    def forward(self, batch: dict[str, Any], part: str) -> dict[str, Tensor]:
        """Return the losses of `part`: `loss`, which is minimised, and other scalars, which are logged.

        A result that the next part needs too may be stored in `batch`. It is there if a step has one batch; else it is
        made again, so that the graphs of all batches need not be kept. Random draws come from torch's default
        generator, which is seeded for every batch, and are made for such results or in the first part only. No value
        is read from the device: the host would wait for it. Parameters that are changed in place (code books) must
        change alike in every process: draw for that from a generator seeded by a buffer, as the default one differs.
        """
        raise NotImplementedError

    def loss_counts(self, batch: dict[str, Any]) -> dict[str, int]:
        """Return over how many elements of a batch (tokens, clips) each loss of `forward` is a mean, by its name.

        The trainer weighs these losses, so that a step's loss is the mean over the elements of all its micro-batches in
        all processes. Losses that are not named count once per micro-batch, as they do where all batches have the same
        shape. Computed from tensors on the host alone.
        """
        return {}

    def tokens(self, batch: dict[str, Any]) -> int:
        """Return the number of tokens (frames) of a batch, for the log."""
        return 0

    def measure(self, folder: Path, share: Share) -> dict[str, float | ByClip]:
        """Measure this process's part of a validation, in eval mode with averaged weights.

        Every process measures its part of the clips; what cannot be divided is measured by the first one. Processes do
        not wait for each other in here. A few fixed clips are written into `folder` as WAV, PNG and MP4 files, which
        trackers show.
        """
        return {}

    def release_info(self) -> Release | None:
        """Describe the release beside its weights; None: this task is not released. See `release_of`."""
        return None

    def release_of(
        self, module: str, title: str, about: str, usage: str, extra: dict[str, Any] | None = None
    ) -> Release:
        """Describe a release of the `Pretrained` submodule `module`; `extra` joins its config."""
        network = self.get_submodule(module)
        left_out = tuple(sorted(network.state_dict().keys() - network.stored().keys()))
        config = network.arguments() | (extra or {})
        return Release(network.kind, config, module, title, about, usage, left_out, self.lora_scale)

    def release_files(self, folder: Path) -> None:
        """Write further files of a release (a tokenizer) into `folder`."""

    def adapted(self) -> nn.Module | None:
        """Return the module whose linear layers low-rank adaptation updates; None: this task has no such training."""
        return None

    def adapt(self, rank: int, alpha: float) -> None:
        """Train only low-rank updates, times `alpha` / `rank`, of the linear layers of `adapted`.

        Layers that are no wider than `rank` on one side are left as they are: the update would hold more than they do.
        """
        module = self.adapted()
        if module is None:
            raise UserError(
                f"lora.rank={rank}: {type(self).__name__} has no low-rank training; use lora.rank=0 (all weights)"
            )
        peft = require("peft", "PEFT", "finetune")
        layers = [
            name
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and min(layer.weight.shape) > rank and not name.endswith("lm_head")
        ]
        if not layers:
            raise UserError(f"lora.rank={rank} is as wide as every layer of the model: give a lower rank")
        self.requires_grad_(False)
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers), module)
        self.lora_scale = alpha / rank
