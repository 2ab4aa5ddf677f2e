"""Distillation of the diffusion heads: guidance as an input, and few long solver steps in place of many short ones.

A patch of the teacher takes n solver steps of two branches each. Its path from noise to data is a broken line, so that
its mean velocity over any step of a coarser schedule is known exactly. The student begins as the teacher's conditional
branch and learns that velocity from the point where the step begins; the guidance scale and the step's length enter
through the heads' `step_mlp` (as in progressive distillation, arXiv 2202.00512, and for the scale 2210.03142). One
evaluation a step is left: 4 in place of 18. All but the two heads stays as it is.

Axes: N examples, C channels, P frames of a patch, K context frames, D width, n solver steps, m steps of the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.device import send
from engine.errors import UserError
from engine.settings import require_range
from engine.training.task import Release
from talker_t2av.diffusion_head import FlowHead
from talker_t2av.flow_matching import euler, guide, solver_times, zero_steps
from talker_t2av.losses import Examples, training_forward
from talker_t2av.model import TalkerT2AV
from talker_t2av.system import load_model
from talker_t2av.task import TalkerTask


class Teacher:
    """The frozen heads of a release, and their paths. It is no part of the task's state, nor of copies of it.

    Args:
        steps: of the solver.
    """

    def __init__(self, model: TalkerT2AV, steps: int) -> None:
        self.heads = {"speech": deepcopy(model.speech_cfm), "motion": deepcopy(model.motion_cfm)}
        self.steps = steps
        for head in self.heads.values():
            head.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict) -> Teacher:
        return self

    @torch.no_grad()
    def path(self, stream: str, examples: Examples, noise: Tensor, guidance: Tensor) -> Tensor:
        """Return where the solver comes by (n + 1, N, C, P) from noise (N, C, P), with guidance (N,) and CFG-Zero*."""
        head = self.heads[stream].to(noise.device)
        schedule = head.schedule(self.steps)
        evaluate = head.branches(examples.mu, examples.cond, examples.global_cond, schedule, True)
        skip = zero_steps(len(schedule.lengths))
        places = [noise] * skip

        def velocity(x: Tensor, i: int) -> Tensor:
            places.append(x)
            return guide(*evaluate(x, i), guidance[:, None, None])

        end = euler(velocity, noise, schedule.lengths, skip)
        return torch.stack([*places, end])


def distillation_loss(head: FlowHead, path: Tensor, examples: Examples, guidance: Tensor, steps: int) -> Tensor:
    """Squared error (scalar) of the student's mean velocity over each of `steps` steps of the teacher's path.

    It is averaged over steps, examples (N may be 0), channels and frames. The host waits for nothing.
    """
    times, own = solver_times(len(path) - 1), solver_times(steps)  # descending, from 1 to 0, on the CPU
    after = torch.searchsorted(-times, -own).clamp(1, len(times) - 1)
    share = send(((times[after - 1] - own) / (times[after - 1] - times[after])).to(path.dtype), path.device)
    after = send(after, path.device)
    places = path[after - 1].lerp(path[after], share[:, None, None, None])  # (m + 1, N, C, P), on the broken line
    starts, lengths = send(torch.stack([own[:-1], own[:-1] - own[1:]]).to(path.dtype), path.device)  # (m,) each
    target = (places[:-1] - places[1:]) / lengths[:, None, None, None]  # (m, N, C, P)

    def each(value: Tensor) -> Tensor:  # (N, ...) -> (m N, ...), step by step
        return value.expand(steps, *value.shape).flatten(0, 1)

    def of_step(value: Tensor) -> Tensor:  # (m,) -> (m N,)
        return value.repeat_interleave(len(guidance))

    velocity = head.mean_velocity(
        places[:-1].flatten(0, 1), each(examples.mu), of_step(starts), of_step(lengths), each(guidance),
        each(examples.cond), each(examples.global_cond),
    )  # fmt: skip
    error = (velocity.float() - target.flatten(0, 1)).square()
    return error.sum() / max(1, error.numel())


class TalkerDistillTask(TalkerTask):
    """A student of a release: only its diffusion heads learn.

    Args:
        init: the teacher: a release folder, or a folder with the released files.
        tokenizer: as `TalkerTask` has it; None: the teacher's.
        guidance_limit: the largest scale that the student learns, from 1 on.
        teacher_steps: of the teacher's solver, whose result the student imitates.
        student_steps: numbers of steps that the student learns; each batch draws one.
        temperature_limit: factors of the noise are drawn from 0 to this.
        sampling: defaults that the release carries; fields that are None: the teacher's, but the first `student_steps`.
        others: as `TalkerTask` has them.
    """

    def __init__(
        self,
        init: str | None,
        codecs: Mapping[str, str],
        tokenizer: str | None = None,
        guidance_limit: float = 3.0,
        teacher_steps: int = 10,
        student_steps: Sequence[int] = (4,),
        temperature_limit: float = 1.0,
        sampling: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if init is None:
            raise UserError("name the release to distil with init=FOLDER")
        if not student_steps:
            raise UserError("task.student_steps is empty: give one number or more, such as [4]")
        require_range("task.teacher_steps", teacher_steps, 1, 1000)
        for steps in student_steps:
            require_range("task.student_steps", steps, 1, 1000)
        require_range("task.guidance_limit", float(guidance_limit), 1.0, 20.0)
        require_range("task.temperature_limit", float(temperature_limit), 0.0, 2.0)
        teacher, words = load_model(init)
        if teacher.config.guidance_limit is not None:
            raise UserError(f"init={init} is a student itself: name its teacher")
        own = dict(teacher.release.get("sampling") or {}) | {"steps": student_steps[0]}
        own |= {name: value for name, value in (sampling or {}).items() if value is not None}
        model = asdict(replace(teacher.config, guidance_limit=float(guidance_limit), repeats=1, phonemes=0))
        super().__init__(model, codecs, tokenizer=tokenizer or str(words), init=init, sampling=own, **others)
        if not 1 <= self.sampling.guidance <= guidance_limit:
            raise UserError(
                f"task.sampling.guidance={self.sampling.guidance:g}: the student learns scales from 1 to "
                f"{guidance_limit:g}; raise task.guidance_limit"
            )
        self.teacher, self.student_steps = Teacher(teacher, teacher_steps), list(student_steps)
        self.temperature_limit = temperature_limit
        self.model.requires_grad_(False)
        for head in self.heads.values():
            head.estimator.requires_grad_(True)

    @property
    def heads(self) -> dict[str, FlowHead]:
        return {"speech": self.model.speech_cfm, "motion": self.model.motion_cfm}

    def adapted(self) -> nn.Module:
        """The heads."""
        return nn.ModuleList(head.estimator for head in self.heads.values())

    def forward(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        """`speech`, `motion` (weighted) and their sum `loss`; see `distillation_loss`. A batch as `TalkerTask`'s."""
        steps = self.student_steps[int(torch.randint(len(self.student_steps), ()))]
        losses = {}
        for stream, examples in self.examples(batch).items():
            noise, guidance = self.draw(examples.x1)
            path = self.teacher.path(stream, examples, noise, guidance)
            losses[stream] = distillation_loss(self.heads[stream], path, examples, guidance, steps)
        losses["motion"] = self.model.config.motion_weight * losses["motion"]
        return losses | {"loss": losses["speech"] + losses["motion"]}

    @torch.no_grad()
    def examples(self, batch: dict[str, Tensor]) -> dict[str, Examples]:
        """Return what the heads get in a batch, by stream; the true latents `x1` are not learned from."""
        forward = training_forward(self.model, batch)
        return {"speech": forward.speech, "motion": forward.motion}

    def draw(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Noise (N, C, P) of a temperature from 0 to the limit, and guidance (N,) from 1 to the limit."""
        u, limit = torch.rand(2, len(like), device=like.device), self.model.config.guidance_limit
        return u[0, :, None, None] * self.temperature_limit * torch.randn_like(like), 1 + (limit - 1) * u[1]

    def release_info(self) -> Release:
        info = super().release_info()
        steps = " or ".join(map(str, self.student_steps))
        return replace(
            info, about=f"{info.about} Its heads take guidance as an input and learned {steps} solver steps."
        )
