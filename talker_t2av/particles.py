"""Particle filter for V2A: several candidates of the speech are generated in parallel and resampled by how well they
match the motion.

The language model receives the given motion, but its speech hardly depends on it, as the timing in training is already
determined by the preceding ground-truth speech. The reverse direction is learned well: the likelihood of the motion
given the speech. By Bayes' rule, this is sufficient. Several candidates of the speech are generated. Before each patch,
every candidate is weighted by how well the motion head, given the hidden state of the candidate, predicts the given
motion of that patch. When the weights become too unequal, candidates are resampled by weight (the bootstrap filter of
Gordon, Salmond and Smith, 1993). This is not part of the paper.

Axes: R requests, B = R n rows (n consecutive candidates per request), S steps, K times, P frames of a patch, p context
patches, C motion channels, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.device import to_device
from engine.errors import UserError
from engine.precision import half_precision
from engine.seeding import generator_for, seed_for
from talker_t2av.generation import BatchedDecoder, Result, Row, tensors_of
from talker_t2av.model import TalkerT2AV
from talker_t2av.request import ORDERS, Mode, Request, Sampling

TIMES = 8  # diffusion times at which the motion head is evaluated
SHARPNESS = 80.0  # decrease of the log weight per unit of mean squared error; chosen on 20 clips (docs/LOG.md)


def unsupported_reason(model: TalkerT2AV) -> str:
    """Return the reason why a model cannot weight candidates, for an error message, or "" if it can.

    Weights are losses of the motion head after the speech of the same patch, which requires that it was trained in this
    order.
    """
    order = model.config.order
    return f"model.order={order}" if order in ORDERS else ""


class Particles(BatchedDecoder):
    """`BatchedDecoder` for V2A with `sampling.particles` candidates per request. The result is the most likely one.

    Each candidate has its own noise, which is scaled by `sampling.particle_temperature`, so that candidates differ
    sufficiently. All requests are added before the first step and removed after the last one.

    Args:
        max_requests: maximum number of requests of a call, none of which waits for another.
    """

    def __init__(self, model: TalkerT2AV, mode: Mode, sampling: Sampling, max_requests: int = 1, **how: Any) -> None:
        self.rows_per_request = sampling.particles
        if reason := unsupported_reason(model):
            raise UserError(
                f"sampling.particles={self.rows_per_request}: the model cannot weight candidates ({reason}); set "
                "sampling.particles=1"
            )
        sampling = replace(sampling, temperature=sampling.particle_temperature)
        super().__init__(model, mode, sampling, max_requests * self.rows_per_request, **how)
        self.times = torch.linspace(0.5 / TIMES, 1 - 0.5 / TIMES, TIMES, device=self.device)

    @property
    def free(self) -> int:
        """Number of requests that can join now: none after the first step."""
        return 0 if any(row.index for row in self.active) else super().free

    @torch.no_grad()
    def join(self, request: Request, **how: Any) -> Row:
        """Add the candidates of a request. Return the first one."""
        assert self.free, "no slot is free"
        if not self.active:
            self.requests: list[Request] = []
            self.ancestors: list[Tensor] = []  # (B,) ancestor row of each row, for each step
            self.log_weights = torch.zeros(0, self.rows_per_request, device=self.device)  # (R, n)
        first = None
        for i in range(self.rows_per_request):
            row = super().join(replace(request, seed=seed_for(request.seed, "draft", i)), like=first, **how)
            first = first or row
        self.requests.append(request)
        self.log_weights = F.pad(self.log_weights, (0, 0, 0, 1))
        return first

    def leave(self, *rows: Row) -> None:
        """Remove rows once all of them have finished; until then they keep their slots."""
        if self.active and all(row.end is not None for row in self.active):
            self.lines = torch.stack(self.ancestors).cpu().tolist()  # copy all of them to the host at once
            self.best = self.log_weights.argmax(1).cpu().tolist()
            self.ended = [*self.active]
            self.active.clear()

    def before_step(self) -> None:
        """Weight the candidates by the given patch of this step, and resample those of requests with unequal
        weights.
        """
        index = self.active[0].index
        count = self.rows_per_request
        if index == 0:
            self.given = self.given_motion()
        errors = self.errors(index) * self.given["counts"][index][:, None]
        log_weights = self.log_weights - SHARPNESS * errors
        weights = log_weights.softmax(-1)  # (R, n)
        unequal = weights.square().sum(-1, keepdim=True) * count > 2  # the effective sample size is below n / 2
        order = torch.arange(count, device=weights.device)
        thresholds = ((order + 0.5) / count).expand_as(weights).contiguous()
        chosen = torch.searchsorted(weights.cumsum(-1), thresholds).clamp(max=count - 1)
        self.log_weights = torch.where(unequal, 0, log_weights)
        first = count * torch.arange(len(weights), device=weights.device)[:, None]
        self.resample((first + torch.where(unequal, chosen, order)).flatten())

    def given_motion(self) -> dict[str, Tensor]:
        """Arrange the motion of all requests as inputs of the motion head in each step.

        Returns:
            counts (S, R), 1 where the step has a given patch, else 0; patch (S, R, C, P); context (S, R, C, p P), the
            frames before it, zeros before the first; noise (S, R, K, C, P), from each request's seed; first (R, C), the
            first frame.
        """
        c = self.model.config
        size = self.model.config.patch_size
        limits = [row.limit for row in self.active]
        steps = torch.arange(max(limits))
        given = []
        for request, limit in zip(self.requests, limits[:: self.rows_per_request]):
            motion = request.motion.cpu()
            number = request.prefix + steps - c.delay  # frames of the patch
            frames = F.pad(motion, (0, 0, c.context * size, (len(steps) + 1) * size))
            window = number.clamp(min=0)[:, None] * size + torch.arange((c.context + 1) * size)
            windows = frames[window].transpose(1, 2)  # (S, C, (p + 1) P)
            shape = (TIMES, motion.shape[1], size)
            seed = request.seed
            noise = [torch.randn(shape, generator=generator_for(seed, "weigh", step)) for step in steps.tolist()]
            counts = ((number >= 0) & (steps < limit)).float()
            given.append((counts, windows[..., -size:], windows[..., :-size], torch.stack(noise), motion[0]))
        *by_step, first = zip(*given)
        tensors = [*(torch.stack(parts, 1) for parts in by_step), torch.stack(first)]
        names = ("counts", "patch", "context", "noise", "first")
        return {name: to_device(tensor, self.device) for name, tensor in zip(names, tensors)}

    def errors(self, index: int) -> Tensor:
        """Return the mean squared error (R, n) of the motion head's velocity for the given patch, at the times
        `TIMES`.
        """
        given = self.given
        head = self.model.motion_cfm.estimator
        n = self.rows_per_request
        patch = given["patch"][index][:, None]
        noise = given["noise"][index]
        t = self.times[:, None, None]
        requests = len(patch)
        noisy = (1 - t) * patch + t * noise  # (R, K, C, P)

        def for_drafts(value: Tensor) -> Tensor:
            """Repeat for all candidates: (R, K, ...) -> (B K, ...)."""
            return value[:, None].expand(requests, n, *value.shape[1:]).flatten(0, 2)

        with half_precision(noisy.device, self.model.dtype):
            known = head.context(given["context"][index], given["first"])[:, None].expand(-1, TIMES, -1, -1)
            state = self.state.hidden[: requests * n, None] + head.time(self.times)  # (B, K, D)
            velocity = head.denoise(for_drafts(noisy), head.decoder.input_proj(state.flatten(0, 1)), for_drafts(known))
        errors = (velocity.float() - for_drafts(noise - patch)).square().mean((1, 2))
        return errors.reshape(requests, n, TIMES).mean(-1)

    def resample(self, rows: Tensor) -> None:
        """Set row i to the state of row `rows[i]`, with rows (B,). Row i keeps its own noise."""
        for x in tensors_of((self.state, self.cache)):
            x[: len(rows)] = x[rows]
        self.ancestors.append(rows)

    def result(self, row: Row) -> Result:
        """Return the most likely candidate of the request whose first candidate is `row`."""
        first = self.ended.index(row)
        return self.candidate(first + self.best[first // self.rows_per_request])

    def candidate(self, slot: int) -> Result:
        """Return the speech of the candidate that finished in a slot, from the patches of its ancestors."""
        row = self.ended[slot]
        patches = []
        for index in range(len(self.lines) - 1, -1, -1):
            patches.append(self.ended[slot].patches["speech"][index])
            slot = self.lines[index][slot]
        speech = torch.stack(patches[::-1])[: row.end].flatten(0, 1)
        return Result(speech, None, row.end < row.limit)
