"""Interface between models and the trainer, and low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685) by PEFT.

LoRA replaces the weight W of linear layers by W + scale * B A, where B (out, rank) is initialised with zeros. Only A
(rank, in) and B are trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import UserError, require
from engine.evaluation.validation import ByClip, Share
from engine.seeding import generator_for

HELD_OUT_BATCH = 4  # number of held-out clips per batch


@dataclass(frozen=True)
class ReleaseInfo:
    """Contents of a release besides its weights.

    Attributes:
        kind: kind of the model; see `engine.release.Pretrained`.
        config: JSON-serialisable constructor arguments, and further values that inference needs.
        module: name of the task's submodule that is released.
        title: title of the card.
        about: description of the model in one or two sentences.
        usage: Python code that loads "FOLDER".
        left_out: tensors of the module that are not stored.
        lora_scale: scale of the low-rank updates, which are merged into the weights. None: no low-rank updates.
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
    """Base class of training tasks: networks, losses, validation, and the contents of the release."""

    lora_scale: float | None = None  # scale of the low-rank updates added by `adapt`
    step = 0  # number of finished optimiser steps
    on_host: tuple[str, ...] = ()  # batch entries that stay in main memory: lengths, on which shapes depend

    def parts(self) -> dict[str, nn.Module]:
        """Return the modules with separate optimisers by name, in update order; see `GANTask`."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Return the repeated modules that contain most of the weights and activations. They must not be nested, and
        must be used by calling them.

        Blocks are the units of sharding, compilation and activation checkpointing.
        """
        return []

    def separate_clip_groups(self) -> list[nn.Module]:
        """Return modules whose gradients are clipped separately, so that they do not scale the others."""
        return []

    def unsharded_modules(self) -> list[nn.Module]:
        """Return modules outside of `blocks` whose parameters `forward` changes in place. They are never sharded."""
        return []

    def begin_step(self, step: int) -> None:
        """Prepare a training step. Schedules depend on `self.step`, a Python integer."""
        self.step = step

    def forward(self, batch: dict[str, Any], part: str) -> dict[str, Tensor]:
        """Return the losses of `part`: `loss`, which is minimised, and other scalars, which are logged.

        Results that the next part also needs may be stored in `batch`. They are available if a step has a single
        micro-batch; otherwise they are recomputed, so that the graphs of all micro-batches need not be kept.

        PyTorch's default generator is seeded for every batch, and may only be used for these results or in the first
        part. Values must not be read from the device, as this requires a sync. Parameters that are changed in place
        (codebooks) must change identically in every process: use a generator that is seeded by a buffer, as the default
        generators differ.
        """
        raise NotImplementedError

    def loss_counts(self, batch: dict[str, Any]) -> dict[str, int]:
        """Return the number of elements of a batch (tokens, clips) over which each loss of `forward` is averaged, by
        name.

        The trainer weights these losses such that the loss of a step is the mean over the elements of all micro-batches
        in all processes. Other losses are averaged over micro-batches. The result must depend on CPU tensors only.
        """
        return {}

    def tokens(self, batch: dict[str, Any]) -> int:
        """Return the number of tokens (frames) of a batch, for the log."""
        return 0

    def measure(self, folder: Path, share: Share) -> dict[str, float | ByClip]:
        """Measure this process's share of a validation, in eval mode with averaged weights.

        Every process measures its share of the clips; the first process also measures what cannot be divided. Processes
        must not wait for each other. A few fixed clips are written to `folder` as WAV and MP4 files, which trackers
        display.
        """
        return {}

    @torch.no_grad()
    def held_out_losses(
        self,
        load: Callable[[int, torch.Generator], Any],
        collate: Callable[[list[Any]], dict[str, Tensor]],
        chosen: Sequence[int],
    ) -> dict[str, float]:
        """Return the mean of each loss over the clips with the indices `chosen`, for `measure`.

        Args:
            load: returns an example of a clip, whose random numbers are drawn from the generator.
            collate: returns the batch of some examples.
        """
        device = next(self.parameters()).device
        sums = Counter()
        for start in range(0, len(chosen), HELD_OUT_BATCH):
            clips = chosen[start : start + HELD_OUT_BATCH]
            batch = collate([load(i, generator_for(0, "held out", i)) for i in clips])
            batch = {name: value if name in self.on_host else value.to(device) for name, value in batch.items()}
            for name, value in self(batch, "model").items():
                sums[name] += len(clips) * float(value)
        return {name: value / len(chosen) for name, value in sums.items()}

    def release_info(self) -> ReleaseInfo | None:
        """Return the contents of the release besides its weights, or None if the task is not released. See
        `release_of`.
        """
        return None

    def release_of(
        self, module: str, title: str, about: str, usage: str, extra: dict[str, Any] | None = None
    ) -> ReleaseInfo:
        """Return the description of a release of the `Pretrained` submodule `module`. `extra` is added to its
        config.
        """
        network = self.get_submodule(module)
        left_out = tuple(sorted(network.state_dict().keys() - network.release_state_dict().keys()))
        config = network.arguments() | (extra or {})
        return ReleaseInfo(network.kind, config, module, title, about, usage, left_out, self.lora_scale)

    def release_files(self, folder: Path) -> None:
        """Write further files of a release, such as a tokenizer, to `folder`."""

    def adapted(self) -> nn.Module | None:
        """Return the module whose linear layers are adapted by LoRA, or None if LoRA is not supported."""
        return None

    def adapt(self, rank: int, alpha: float) -> None:
        """Train only low-rank updates of the linear layers of `adapted`, scaled by `alpha` / `rank`.

        Layers whose input or output is not wider than `rank` are not adapted.
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
            raise UserError(f"lora.rank={rank} is as wide as every layer of the model: use a lower rank")
        self.requires_grad_(False)
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers), module)
        self.lora_scale = alpha / rank
