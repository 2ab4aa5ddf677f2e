"""Batched autoregressive decoding of T2AV, TTS, A2V and V2A: each step adds a patch of 160 ms to every row.

A batch joins all requests at once and steps until they finish. A stream joins a single request, a service joins
requests as they arrive, and `talker_t2av.particles` joins several copies of a request.

A mode defines whether speech and motion are generated, given or absent. Given frames of a generated stream are a
prefix, which the decoder continues. Position j of the sequence contains speech patch j and motion patch j - delay, as
in training.

In training, the hidden state after the token of the last patch is labelled as stop, and the two states before it are
unlabelled. By default, the first positive stop prediction therefore ends a row, and so does a patch whose last frame
is padding, as only the last patch is padded. The official routines wait for three consecutive positive predictions
(`StoppingRules`, talker_t2av/official.py).

The KV cache is allocated once, for a fixed number of rows and a length that is a multiple of `BUCKET`, and reused for
later requests. It grows if a request needs more tokens, up to the backbone's maximum position. Rows are contiguous:
when a row finishes, the last row moves to its slot. A step is a function of tensors whose shapes depend only on the
number of rows and the bucket, so that there is one CUDA graph for each combination (engine/cuda_graph.py). Noise is
drawn when a row joins, and stop predictions stay on the device.

Axes: B rows, T prompt tokens, S steps, n tokens of a patch, P frames of a patch, F frames, C channels (Ds of speech, Dm
of motion), G speaker embedding, N cached tokens, L layers, H key heads, h head width, p context patches, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cuda_graph import CudaGraphs, GraphedStep, map_tensors
from engine.device import to_device
from engine.errors import UserError
from engine.precision import half_precision
from talker_t2av.model import KeyValues, TalkerT2AV
from talker_t2av.prompt import known_tokens, seeded_noise, step_limit
from talker_t2av.request import ORDERS, Mode, Request, Sampling, Stream, tokens_per_patch

BUCKET = 64  # the cache length in tokens is a multiple of it
PADDING = 0.2  # RMS of speech latents; generated padding has 0.13 or less, speech and silence 0.46 or more


@dataclass(frozen=True)
class Patch:
    """Result of one step for all rows, in the order of `BatchedDecoder.active` before the step.

    Attributes:
        speech, motion: (B, P, C) new frames. None for a stream that is not generated, or not yet.
        token: (B, D) last input of the backbone.
        stop: (B,) probability that the utterance ends with this step. None if a given stream determines the length.
    """

    speech: Tensor | None
    motion: Tensor | None
    token: Tensor
    stop: Tensor | None


@dataclass(frozen=True)
class Result:
    """New frames of one row, without the prefix: speech (F, Ds), and normalised motion (F, Dm), or None.

    Attributes:
        stopped: whether the stop head or padding ended it, instead of the limit.
    """

    speech: Tensor | None
    motion: Tensor | None
    stopped: bool


@dataclass(eq=False)
class Row:
    """State of a request in the batch.

    Attributes:
        limit: maximum number of steps.
        tokens: number of cached tokens after these steps.
        prompt: (T, D) tokens before the first generated patch.
        index: number of steps so far.
        end: number of steps at the end; None while it is running.
        patches: (P, C) frames of each generated patch.
    """

    request: Request
    limit: int
    tokens: int
    prompt: Tensor
    patches: dict[Stream, list[Tensor]]
    index: int = 0
    end: int | None = None


@dataclass(frozen=True)
class State:
    """State of all rows, which each step replaces.

    Attributes:
        hidden: (B, D) hidden state after the last token.
        context: (B, p P, C) frames before the next patch, by stream.
        index: (B,) number of steps.
        length: (B,) number of cached tokens.
        hits: (B,) consecutive positive stop predictions.
        end: (B,) steps after which a row ends, as known so far.
    """

    hidden: Tensor
    context: dict[Stream, Tensor]
    index: Tensor
    length: Tensor
    hits: Tensor
    end: Tensor


@dataclass(frozen=True)
class Plan:
    """Constant inputs of a step, by row. N is larger than the number of steps of any row.

    Attributes:
        known: (B, N, n, D) part of the tokens that does not depend on generated frames.
        noise: (B, N, C, P).
        condition: (B, G) speaker embedding, or first frame of the motion.
        first_test, stop_hits, padding_ends: (B,) see `StoppingRules`.
    """

    known: Tensor
    noise: dict[Stream, Tensor]
    condition: dict[Stream, Tensor]
    first_test: Tensor
    stop_hits: Tensor
    padding_ends: Tensor


class BatchedDecoder:
    """Batched generation of requests of one mode: `join`, `step`, `leave`, or `generate`, which does all three.

    Finished rows are removed automatically. The rest of the batch only affects rounding.

    Args:
        max_rows: number of slots, the maximum number of concurrent rows.
        use_stop: whether the stop head ends rows. It never does if a given stream determines the length.
        check_every: steps between two checks of the stop predictions, which synchronise with the device. Results do not
            depend on it, but rows may be computed past their end. Default: 1 on a CPU, where an extra patch costs more
            than a sync, and 4 on other devices.
        compile: compile the step with `torch.compile`.
        backend: see `GraphedStep`.

    Attributes:
        rows_per_request: number of rows that a request takes.
        active: running rows, in the order of their slots.
        patch: result of the last step.
        length: N.
    """

    rows_per_request = 1

    def __init__(
        self,
        model: TalkerT2AV,
        mode: Mode,
        sampling: Sampling,
        max_rows: int = 1,
        use_stop: bool = True,
        check_every: int | None = None,
        compile: bool = False,
        backend: CudaGraphs | None = None,
    ) -> None:
        c = model.config
        self.model = model
        self.device = model.device
        self.mode = mode
        self.sampling = sampling
        self.max_rows = max_rows
        self.check_every = check_every or (1 if self.device.type == "cpu" else 4)
        self.uses_stop_head = use_stop and mode.open_ended
        self.streams: list[Stream] = [s for s in ("speech", "motion") if getattr(mode, s) == "generated"]
        self.delay = c.delay if mode.motion == "generated" else 0
        self.lag = {"speech": 0, "motion": self.delay}
        self.per_patch = tokens_per_patch(c.order, mode.motion != "absent")
        # The streams of each token of a patch.
        self.turns = [[s] for s in ORDERS[c.order]] if self.per_patch == 2 else [self.streams]
        self.heads = {"speech": model.speech_cfm, "motion": model.motion_cfm}
        self.encoders = {"speech": model.speech_tokens, "motion": model.motion_tokens}
        self.schedules = {s: self.heads[s].schedule(sampling.steps) for s in self.streams}
        self.run_step = GraphedStep(self._step, self.device, compile, backend)
        self.active: list[Row] = []
        self.patch: Patch | None = None
        self.steps_taken = 0
        self._allocate(BUCKET)

    @property
    def free(self) -> int:
        """Number of requests that can join now."""
        return (self.max_rows - len(self.active)) // self.rows_per_request

    def needs(self, request: Request) -> tuple[int, int]:
        """Return the maximum number of steps of a request, and the number of cached tokens after these steps.

        Raises:
            UserError: If there is no patch to generate, or the tokens exceed the backbone's maximum position.
        """
        limit = step_limit(self.model, request, self.mode)
        max_tokens = self.model.llm.config.max_position_embeddings
        if limit < 1:
            raise UserError(f"nothing to generate: {limit} patches remain after the prefix")
        prompt = len(request.prompt) + request.task_first + self.per_patch * request.prefix
        if (tokens := prompt + self.per_patch * limit) > max_tokens:
            raise UserError(
                f"{prompt} tokens of text and prefix and {limit} patches exceed {max_tokens}: use a shorter text"
            )
        return limit, tokens

    @torch.no_grad()
    def join(self, request: Request, noise: Mapping[Stream, Tensor] | None = None, like: Row | None = None) -> Row:
        """Compute the prompt of a request. The row takes part from the next step on.

        Args:
            noise: (S, C, P) by stream, for the maximum number of patches. Default: drawn from the seed of the request.
            like: a row that has just joined with the same prompt, which is then reused.

        Raises:
            UserError: See `needs`.
        """
        assert len(self.active) < self.max_rows, "no slot is free"
        c = self.model.config
        size = c.patch_size
        slot = len(self.active)
        limit, tokens = self.needs(request)
        request = map_tensors(lambda x: to_device(x, self.device), request)
        with half_precision(self.device, self.model.dtype):
            prompt, known = known_tokens(self.model, request, self.mode, limit)
        if tokens > self.length:
            self._allocate(tokens)
        row = Row(request, limit, tokens, prompt, {s: [] for s in self.streams})
        shapes = {"speech": (c.speech_dim, size), "motion": (c.motion_dim, size)}
        if noise is None:
            noise = {s: seeded_noise(request, s, shapes[s], limit - self.lag[s]) for s in self.streams}
        condition = {"speech": request.speaker, "motion": request.first_motion}
        self.plan.known[slot, :limit] = known
        for s in self.streams:
            self.plan.noise[s][slot, : len(noise[s])] = to_device(noise[s], self.device)
            self.plan.condition[s][slot] = condition[s]
            frames = getattr(request, s)  # frames of the prefix in whole patches, zero-padded
            frames = F.pad(frames, (0, 0, c.context * size, -len(frames) % size))
            self.state.context[s][slot] = frames[len(frames) - c.context * size :]
        if like is None:
            position = torch.arange(len(prompt), device=prompt.device)[None]
            cache = KeyValues(self.cache[slot : slot + 1, ..., : len(prompt), :], position)
            visible = position[..., None] >= position[:, None]
            self.state.hidden[slot] = self.model.continue_cache(cache, prompt[None], visible, position)[0]
        else:
            other = self.active.index(like)
            self.state.hidden[slot] = self.state.hidden[other]
            self.cache[slot] = self.cache[other]
        first_test = max(request.rules.first_test, request.min_patches + self.delay)
        for tensor, number in (
            (self.state.index, 0),
            (self.state.length, len(prompt)),
            (self.state.hits, 0),
            (self.state.end, limit),
            (self.plan.first_test, first_test),
            (self.plan.stop_hits, request.rules.stop_hits),
            (self.plan.padding_ends, request.rules.padding_ends),
        ):
            tensor[slot].fill_(number)  # `tensor[slot] = number` would synchronise, as it copies from the host
        self.active.append(row)
        return row

    @torch.no_grad()
    def step(self, check_stop: bool = False) -> list[Row]:
        """Generate one patch of all rows. Return the rows that finished with it, which have been removed.

        Args:
            check_stop: check the stop predictions now, regardless of `check_every`.
        """
        rows = [*self.active]
        # With CUDA graphs, the number of rows is rounded up to a power of two, so that there are few graphs.
        count = len(rows) if self.run_step.backend is None else min(self.max_rows, 1 << (len(rows) - 1).bit_length())
        self.before_step()
        streams = tuple(s for s in self.streams if any(row.index >= self.lag[s] for row in rows))
        tokens = -(-max(row.tokens for row in rows) // BUCKET) * BUCKET
        new, patches, token, stop = self._run_rows(count, streams, tokens)
        torch._foreach_copy_(tensors_of(map_tensors(lambda x: x[:count], self.state)), tensors_of(new))
        self.steps_taken += 1
        drawn = {s: patch[: len(rows)] for s, patch in patches.items()}
        stop = None if stop is None else stop[: len(rows)]
        self.patch = Patch(drawn.get("speech"), drawn.get("motion"), token[: len(rows)], stop)
        for slot, row in enumerate(rows):
            for s in streams:
                if row.index >= self.lag[s]:
                    row.patches[s].append(drawn[s][slot])
            row.index += 1
        ends = [row.limit for row in rows]
        check_stop = (
            check_stop or self.steps_taken % self.check_every == 0 or any(row.index >= row.limit for row in rows)
        )
        if self.uses_stop_head and check_stop:
            ends = self.state.end[: len(rows)].cpu().tolist()
        ended = [(row, end) for row, end in zip(rows, ends) if row.end is None and end <= row.index]
        for row, end in ended:
            row.end = end
        self.leave(*(row for row, _ in ended))
        return [row for row, _ in ended]

    def _run_rows(
        self, count: int, streams: tuple[Stream, ...], tokens: int
    ) -> tuple[State, dict[Stream, Tensor], Tensor, Tensor | None]:
        """Run `_step` on the first `count` slots with `tokens` cached tokens, as a CUDA graph if possible."""
        state, plan = map_tensors(lambda x: x[:count], (self.state, self.plan))
        return self.run_step(state, streams, fixed=(plan, self.cache[:count, ..., :tokens, :]))

    @torch.no_grad()
    def warm_up(self, tokens: int) -> None:
        """Capture the CUDA graphs of all numbers of rows and cache lengths up to `tokens`, before rows join.

        Without CUDA this does nothing.
        """
        if self.run_step.backend is None:
            return
        assert not self.active, "rows are running"
        if tokens > self.length:
            self._allocate(tokens)
        # With a delay, the first steps generate no motion.
        begin = tuple(s for s in self.streams if not self.lag[s])
        counts = {min(self.max_rows, 1 << power) for power in range(self.max_rows.bit_length() + 1)}
        for count in sorted(counts, reverse=True):  # graphs of single rows are kept longest
            for length in range(BUCKET, tokens + BUCKET, BUCKET):
                for streams in dict.fromkeys([begin, tuple(self.streams)]):
                    self._run_rows(count, streams, length)

    def before_step(self) -> None:
        """Hook for subclasses; see `talker_t2av.particles`."""

    def leave(self, *rows: Row) -> None:
        """Remove rows. The last rows move to their slots."""
        for row in rows:
            if row not in self.active:
                continue
            slot = self.active.index(row)
            last = self.active.pop()
            if last is not row:
                self.active[slot] = last
                for x in tensors_of((self.state, self.plan, self.cache)):
                    x[slot] = x[len(self.active)]

    def result(self, row: Row) -> Result:
        """Return the new frames of a finished row."""
        assert row.end is not None, "the row is running"
        counts = {"speech": row.end - self.delay if row.request.rules.trim else row.end, "motion": row.end - self.delay}
        frames = {s: torch.stack(x)[: counts[s]].flatten(0, 1) for s, x in row.patches.items() if x}
        return Result(frames.get("speech"), frames.get("motion"), row.end < row.limit)

    def generate(
        self, requests: Sequence[Request], on_step: Callable[[int], None] = lambda running: None
    ) -> list[Result]:
        """Generate requests to the end and return the results in order. Requests without a free slot wait.

        Args:
            on_step: called after each step with the number of unfinished requests before it, as known to the host.
        """
        for request in requests:
            self.needs(request)
        waiting = deque(requests)
        joined: list[Row] = []
        try:
            while waiting or self.active:
                for _ in range(min(self.free, len(waiting))):
                    joined.append(self.join(waiting.popleft()))
                running = sum(row.end is None for row in self.active) // self.rows_per_request
                self.step()
                on_step(running)
        finally:
            self.active.clear()
        return [self.result(row) for row in joined]

    def stream(self, request: Request) -> Iterator[Patch]:
        """Generate one request and yield its patches as they are generated."""
        row = self.join(request)
        try:
            while row.end is None:
                self.step(check_stop=True)
                yield self.patch
        finally:
            self.leave(row)

    # The step is a function of tensors, without synchronisation.

    def _step(
        self, state: State, streams: tuple[Stream, ...], plan: Plan, cache: Tensor
    ) -> tuple[State, dict[Stream, Tensor], Tensor, Tensor | None]:
        """Generate one patch of all rows: flow solvers, patch encoders, backbone, stop prediction. Writes to the cache.

        Args:
            streams: generated streams.
            cache: (B, L, 2, H, N, h).

        Returns:
            The next state, the new patches (B, P, C), the last token (B, D), and the stop probability (B,).
        """
        row = torch.arange(len(cache), device=cache.device)
        last = plan.known.shape[1] - 1  # clamp unused and finished rows to valid indices
        known = plan.known[row, state.index.clamp(max=last)]
        hidden = state.hidden
        context = dict(state.context)
        patches = {}
        for i, turn in enumerate(self.turns):
            token = known[:, i]
            for s in turn:
                if s not in streams:
                    continue
                number = state.index - self.lag[s]
                noise = plan.noise[s][row, number.clamp(0, last)]
                with half_precision(noise.device, self.model.dtype):
                    patch = self.heads[s].sample(
                        hidden, context[s].transpose(1, 2), plan.condition[s], noise, self.schedules[s],
                        self.sampling.temperature, self.sampling.guidance, unguided=self.sampling.unguided,
                    ).transpose(1, 2)  # fmt: skip
                    drawn = self.encoders[s](patch)  # (B, D)
                    after = torch.cat([context[s], patch], 1)[:, patch.shape[1] :]
                if self.lag[s]:
                    begun = (number >= 0)[:, None]
                    drawn = torch.where(begun, drawn, 0)
                    after = torch.where(begun[..., None], after, context[s])
                patches[s] = patch
                context[s] = after
                token = token + drawn
            position = (state.length + i).clamp(max=cache.shape[-2] - 1)[:, None]
            visible = torch.arange(cache.shape[-2], device=cache.device) <= position[..., None]  # (B, 1, N)
            hidden = self.model.continue_cache(KeyValues(cache, position), token[:, None], visible, position)
        index = state.index + 1
        hits = state.hits
        end = state.end
        stop = None
        if self.uses_stop_head:
            stop = self.model.head_stop(hidden).sigmoid()
            hits = torch.where((stop >= 0.5) & (index >= plan.first_test), hits + 1, 0)
            end = torch.where(hits >= plan.stop_hits, torch.minimum(end, index), end)
            padded = is_padding(patches["speech"][:, -1]) & plan.padding_ends & (index >= plan.first_test)
            end = torch.where(padded, torch.minimum(end, index + self.delay), end)
        return State(hidden, context, index, state.length + len(self.turns), hits, end), patches, token, stop

    def _allocate(self, tokens: int) -> None:
        """Allocate tensors for all slots and at least `tokens` tokens, and copy the running rows."""
        c = self.model.config
        llm = self.model.llm.config
        size = c.patch_size
        channels = {"speech": c.speech_dim, "motion": c.motion_dim}
        conditions = {"speech": c.speaker_dim, "motion": c.motion_dim}
        before = tensors_of((self.state, self.plan, self.cache)) if self.active else []
        length = -(-tokens // BUCKET) * BUCKET

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(self.max_rows, *shape, dtype=dtype, device=self.device)

        with torch.inference_mode(False):  # inference tensors could not be written to outside of inference mode
            index, total, hits, end, first_test, stop_hits = (zeros(dtype=torch.long) for _ in range(6))
            padding_ends = zeros(dtype=torch.bool)
            context = {s: zeros(c.context * size, channels[s]) for s in self.streams}
            state = State(zeros(self.model.width), context, index, total, hits, end)
            noise = {s: zeros(length, channels[s], size) for s in self.streams}
            condition = {s: zeros(conditions[s]) for s in self.streams}
            known = zeros(length, self.per_patch, self.model.width)
            plan = Plan(known, noise, condition, first_test, stop_hits, padding_ends)
            shape = llm.num_hidden_layers, 2, llm.num_key_value_heads, length, llm.head_dim
            cache = zeros(*shape, dtype=self.model.dtype)
        for old, new in zip(before, tensors_of((state, plan, cache))):
            new[tuple(slice(0, size) for size in old.shape)] = old
        # Replace the tensors last, so that running rows are unaffected if the allocation fails.
        self.state = state
        self.plan = plan
        self.cache = cache
        self.length = length
        self.run_step.graphs.clear()  # they refer to the former tensors


def is_padding(latents: Tensor) -> Tensor:
    """Return which generated speech latents (..., Ds) are padding: (...)."""
    return latents.square().mean(-1) < PADDING**2


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in `value`, in the order of `map_tensors`."""
    tensors: list[Tensor] = []
    map_tensors(tensors.append, value)
    return tensors
