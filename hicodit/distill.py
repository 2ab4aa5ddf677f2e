"""Distillation of a HiCoDiT release: guidance as an input in place of branches, then fewer steps.

The student begins as the teacher's conditional branch. At the tokens that are masked it learns the teacher's guided
distribution for scales drawn at random, which enter as an embedding (arXiv 2210.03142 for continuous models): one
network evaluation in place of one a branch, with any scales up to a limit. With `substeps` above 1 it learns what the
teacher says later on its way: the sampler goes on from these tokens by so many steps, and a token's target is the
distribution at the step that revealed it, or at the last (self-distillation through time, arXiv 2410.21035). The
teacher may itself be a student: each round then divides the steps.

Axes: B batch, K token levels, L token frames, M masked positions, N real tokens, G guidance branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.settings import require_range
from engine.training.task import Release
from hicodit.conditions.types import Conditions
from hicodit.diffusion import LogLinearNoise, sample_categorical
from hicodit.guidance import combine_rows
from hicodit.model import BRANCHES, HiCoDiT, rows_of
from hicodit.settings import stored_guidance
from hicodit.system import HiCoDiTSystem
from hicodit.task import MIN_TIME, HiCoDiTTask


def draw_scales(batch: int, limit: float, device: torch.device | str = "cpu") -> Tensor:
    """Draw guidance scales (B, 4): of all conditions from 1 to `limit`; each single one is 0 or, as often, up to it."""
    u, single = torch.rand(batch, 4, device=device), torch.rand(batch, 3, device=device) < 0.5
    return torch.cat([1 + (limit - 1) * u[:, :1], limit * u[:, 1:] * single], 1)


class Teacher:
    """A frozen score network and its targets. It is no part of the task's state, nor of copies of it.

    Args:
        substeps: steps of the sampler that a target looks ahead. steps: of the sampler, from t = 1 to 0.
    """

    def __init__(self, model: HiCoDiT, substeps: int = 1, steps: int = 64) -> None:
        self.model, self.substeps, self.steps = model.eval().requires_grad_(False), substeps, steps
        self.noise = LogLinearNoise()

    def __deepcopy__(self, memo: dict) -> Teacher:
        return self

    @torch.no_grad()
    def targets(
        self, tokens: Tensor, t: Tensor, conditions: Conditions, scales: Tensor, where: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Compute the student's targets, guided log posteriors (M, N) with scales (B, 4), at the masked positions of
        tokens (B, K, L) at times (B,), without synchronising with the host.
        """
        model, (clip, level, frame) = self.model.to(t.device), rows_of(where)
        takes_scales = model.config.guidance_limit is not None
        if takes_scales:
            conditioning = model.prepare(conditions, scales=scales)
        else:
            conditioning = model.prepare(conditions, tuple(BRANCHES))

        def guided(tokens: Tensor, t: Tensor) -> Tensor:
            log_p = model(tokens, self.noise.sigma(t), conditioning, where)
            return log_p[0].log_softmax(-1) if takes_scales else combine_rows(log_p, scales[clip])

        out = log_q = guided(tokens, t)
        tokens, masked = tokens.clone(), torch.ones_like(clip, dtype=torch.bool)
        for _ in range(self.substeps - 1):
            drawn = sample_categorical(log_q.exp(), torch.rand_like(log_q))
            reveal = masked & (torch.rand(len(clip), device=t.device) * self.steps * t[clip] < 1)  # as Euler does
            tokens[clip, level, frame] = torch.where(reveal, drawn, tokens[clip, level, frame])
            masked, t = masked & ~reveal, (t - 1 / self.steps).clamp(min=MIN_TIME)
            log_q = guided(tokens, t)
            out = torch.where(masked[:, None], log_q, out)
        return out


class DistillTask(HiCoDiTTask):
    """A student of a release; the condition encoders stay as they are.

    Args:
        init: release folder of the teacher, from which the student starts.
        encoders: `kind`, that of the teacher's encoders; `folder` of the released ones' files (None: as in training).
        guidance_limit: the largest scale that the student learns; from 1 on for all conditions, from 0 on for each.
        substeps, teacher_steps: see `Teacher`; 1 distils guidance alone.
        sampler, guidance: defaults that the release carries; fields that are None: the teacher's.
        others: as `HiCoDiTTask` has them.
    """

    tokens_loss = "kl"

    def __init__(
        self,
        init: str | None,
        encoders: dict[str, Any],
        guidance_limit: float = 3.0,
        substeps: int = 1,
        teacher_steps: int = 64,
        sampler: dict[str, Any] | None = None,
        guidance: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if init is None:
            raise UserError("name the release to distil with init=FOLDER")
        for name, value in (("substeps", substeps), ("teacher_steps", teacher_steps)):
            require_range(f"task.{name}", value, 1, 1000)
        teacher = HiCoDiTSystem.from_pretrained(init, encoders=encoders.get("folder"))
        own, known = teacher.encoders.config, teacher.model.config
        if own.kind != encoders["kind"]:
            recipe = {"tiny": "hicodit_distill", "released": "hicodit_distill_paper"}.get(own.kind)
            raise UserError(f"init={init} has {own.kind} encoders: use experiment={recipe}")
        if known.guidance_limit not in (None, guidance_limit):
            raise UserError(f"init={init} takes scales up to {known.guidance_limit:g}: set task.guidance_limit to that")
        stored = {"sampler": teacher.release.get("sampler") or {}, "guidance": stored_guidance(teacher.release)}
        carried = {
            name: stored[name] | {k: v for k, v in (given or {}).items() if v is not None}
            for name, given in (("sampler", sampler), ("guidance", guidance))
        }
        model = asdict(replace(known, guidance_limit=guidance_limit, dropout=0.0))
        super().__init__(model, asdict(own), init=init, **carried, **others)
        self.guidance.check_input(guidance_limit)
        self.teacher = Teacher(teacher.model, substeps, teacher_steps)
        self.system.requires_grad_(False)
        self.system.model.requires_grad_(True)
        self.system.model.identity_adapter.requires_grad_(False)

    def clipped_apart(self) -> list[nn.Module]:
        return []

    def forward(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        """Compute the KL divergence of the student's posterior from the teacher's, by group of levels.

        A batch is that of `HiCoDiTTask`. The sum over the masked tokens is divided by the number of all.
        """
        model = self.system.model
        with torch.no_grad():
            conditions, _ = self.conditions(batch)
            t, noisy, where = self.mask(batch["tokens"], conditions.frames)
            scales = draw_scales(len(t), model.config.guidance_limit, t.device)
            target = self.teacher.targets(noisy, t, conditions, scales, where)
        conditioning = model.prepare(conditions, scales=scales)
        log_q = model(noisy, self.noise.sigma(t), conditioning, where)[0].log_softmax(-1)
        divergence = (target.exp() * (target - log_q)).sum(-1)
        losses = self.by_stage("kl", divergence, where, conditions.frames)
        return losses | {"loss": sum(losses.values())}

    def release_info(self) -> Release:
        info = super().release_info()
        return replace(info, about=f"{info.about} It takes guidance as an input: one network evaluation a step.")
