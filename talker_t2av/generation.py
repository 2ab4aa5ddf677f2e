"""One autoregressive loop for T2AV, TTS, A2V and V2A: every step adds a patch of 160 ms.

A mode says whether speech and motion are generated, given or absent. Frames of a generated stream that are given are a
prefix, which the loop continues. Slot j of the sequence holds speech patch j and motion patch j - delay, as in
training. If the model has task embeddings for A2V and V2A, slot j holds patch j + 1 of the given stream, so that a
patch is drawn with the other stream's patch of the same time known. All slots of the prefix enter the backbone at once.

Training labels the hidden state after the last patch's token as the stop and leaves the two states before it without a
label: so by default the first positive stop test ends a row. The official routines wait for three in a row
(`LoopRules`, talker_t2av/official.py).

Shapes are the same in every step: rows that have ended stay in the batch, and `results` leaves out what was drawn after
their end. The noise is drawn beforehand, the stop test stays on the device, and the host reads it every `check_every`
steps.

Axes: B rows, T prompt tokens, S steps, M patches of a stream, P frames of a patch, F frames, C channels (Ds of speech,
Dm of motion), N tokens that the cache holds, Q tokens that enter it at once, p context patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StaticCache

from engine.errors import UserError
from engine.precision import half_precision
from engine.seeding import generator_for
from talker_t2av.interleaved import known_pairs
from talker_t2av.model import TalkerT2AV
from talker_t2av.request import A2V, ORDERS, PAPER, T2AV, V2A, LoopRules, Mode, Request, Sampling, tokens_per_patch
from talker_t2av.streams import EncodedStream

Stream = Literal["speech", "motion"]


@dataclass(frozen=True)
class Step:
    """What one step did to all rows, also to those that have ended.

    Attributes:
        index: number of the step.
        running: rows that had not ended before this step, as far as the host has read the stop tests.
        hidden: (B, D) state that the heads saw.
        speech, motion: (B, P, C) new patches; None for a stream that is not generated.
        token: (B, D) input of the backbone for the next step.
        stop: (B,) probability that the utterance ends with this step; None where it is not tested.
    """

    index: int
    running: int
    hidden: Tensor
    speech: Tensor | None
    motion: Tensor | None
    token: Tensor
    stop: Tensor | None


@dataclass(frozen=True)
class Result:
    """New frames of one row, without the prefix: speech (F, Ds), and motion (F, Dm) normalised, or None.

    stopped: the stop head ended it, not the limit.
    """

    speech: Tensor | None
    motion: Tensor | None
    stopped: bool


@dataclass
class LoopState:
    """What a step reads and replaces. No shape changes from step to step.

    Attributes:
        cache: keys and values of the backbone, N tokens.
        hidden: (B, D) state after the last token.
        context: by generated stream, the frames (B, p P, C) before the next patch.
        index: () number of the next step.
        hits: (B,) positive stop tests in a row.
        end: (B,) steps after which a row ends, as known so far.
    """

    cache: StaticCache
    hidden: Tensor
    context: dict[Stream, Tensor]
    index: Tensor
    hits: Tensor
    end: Tensor


def known_tokens(
    model: TalkerT2AV, requests: Sequence[Request], mode: Mode, rules: LoopRules, steps: int
) -> tuple[list[Tensor], Tensor]:
    """What is known before the loop: text, prefix, given streams, and which motion is absent.

    Returns:
        For each row, the tokens (T, D) of task, text and prefix; and the known part (S, B, D) of the tokens after it,
        (S, B, 2, D) where a patch is two tokens.
    """
    c, before, after = model.config, [], []
    task = mode.task if mode.task < c.tasks else T2AV
    ahead = task in (A2V, V2A)  # the token before slot 0 holds the given stream's first patch
    speech = EncodedStream(model.speech_tokens, [r.speech for r in requests], c.patch_size)
    if mode.motion != "absent":
        motion = EncodedStream(model.motion_tokens, [r.motion for r in requests], c.patch_size)
        if c.order in ORDERS:
            return known_pairs(model, {"speech": speech, "motion": motion}, requests, mode, steps)
    for row, request in enumerate(requests):
        slots = torch.arange(-int(ahead), request.prefix + steps, device=model.device)
        prefix = slots < request.prefix
        tokens = speech.patches(row, slots + int(task == A2V)) * (prefix | (mode.speech == "given"))[:, None]
        if mode.motion == "absent":
            tokens = tokens + model.motion_pad_emb[0]
        else:
            waiting = slots < request.prefix + c.delay  # for the first generated motion
            filled = torch.full_like(prefix, mode.motion == "given") | (waiting & (not rules.motion_waits))
            filled = torch.where(prefix, request.prefix_has_motion, filled)
            tokens = tokens + motion.patches(row, slots + (1 if task == V2A else -c.delay)) * filled[:, None]
        text = model.embed_text(torch.tensor([request.prompt], dtype=torch.long, device=model.device))[0]
        start, later = tokens.split([request.prefix + int(ahead), steps])
        embedding = model.task_embedding.weight[task : task + 1]
        if request.task_first:
            text = torch.cat([embedding, text])
        elif len(start):
            start = torch.cat([start[:1] + embedding, start[1:]])
        if ahead:
            text, start = torch.cat([text[:-1], text[-1:] + start[:1]]), start[1:]
        before.append(torch.cat([text, start]))
        after.append(later)
    return before, torch.stack(after, 1)


def step_limit(model: TalkerT2AV, request: Request, mode: Mode) -> int:
    """Steps after which a row ends at the latest. Motion lags by `delay` slots, which come on top."""
    size, delay = model.config.patch_size, model.config.delay
    if mode.speech == "given":
        return -(-len(request.speech) // size) + delay - request.prefix
    if mode.motion == "given":
        return -(-len(request.motion) // size) - request.prefix
    return request.max_patches + (delay if mode.motion == "generated" else 0)


def seeded_noise(requests: Sequence[Request], stream: Stream, shape: tuple[int, int], patches: int) -> Tensor:
    """Noise (M, B, C, P) of a stream; that of a patch depends on the row's seed, the stream and the patch's number."""
    numbers = range(patches)
    rows = [[torch.randn(shape, generator=generator_for(r.seed, stream, n)) for n in numbers] for r in requests]
    return torch.stack([torch.stack(row) for row in rows], 1)


class PatchLoop:
    """Generation of a batch: iterate over it for the steps, then take `results`.

    Args:
        rules: how rows end.
        noise: (M, B, C, P) by stream, for as many patches as may be drawn; by default from each row's seed.
        use_stop: let the stop head end rows; it never does where a given stream sets the length.
        check_every: steps between two reads of the stop tests, each of which makes an accelerator wait for the host.
            Results do not depend on it; rows may be computed past their end. By default 1 on a CPU, where a patch
            in vain costs more than a read, and 4 elsewhere.
        compiled: wraps `step`, such as `torch.compile`.

    Attributes:
        limits: steps after which each row ends at the latest.
        asks_stop: the stop head is asked where rows end.
        prompts: (T, D) tokens of each row before the first generated patch.

    Raises:
        UserError: a row has no patch to generate, or needs more tokens than the backbone has positions.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: TalkerT2AV,
        requests: Sequence[Request],
        mode: Mode,
        sampling: Sampling,
        rules: LoopRules = PAPER,
        noise: Mapping[Stream, Tensor] | None = None,
        use_stop: bool = True,
        check_every: int | None = None,
        compiled: Callable[[Callable], Callable] | None = None,
    ) -> None:
        c, size, device = model.config, model.config.patch_size, model.device
        requests = [_to_device(request, device) for request in requests]
        self.model, self.mode, self.sampling, self.rules = model, mode, sampling, rules
        self.check_every = check_every or (1 if device.type == "cpu" else 4)
        self.run_step = compiled(self.step) if compiled else self.step
        self.asks_stop = use_stop and mode.open_ended
        self.delay = c.delay if mode.motion == "generated" else 0
        self.limits = [step_limit(model, request, mode) for request in requests]
        self.steps = max(self.limits)
        if min(self.limits) < 1:
            raise UserError(f"nothing to generate: {min(self.limits)} patches are left after the prefix")
        first_tests = [max(rules.first_test, request.min_patches + self.delay) for request in requests]
        self.first_test = torch.tensor(first_tests, device=device)

        with half_precision(device, model.dtype):
            self.prompts, self.known = known_tokens(model, requests, mode, rules, self.steps)
        self.longest = longest = max(map(len, self.prompts))
        most = model.llm.config.max_position_embeddings
        self.per_patch = tokens_per_patch(c.order, mode.motion != "absent")
        self.capacity = longest + self.per_patch * self.steps
        if self.capacity > most:
            raise UserError(
                f"{longest} tokens of text and prefix and {self.steps} patches exceed {most}: give less text"
            )

        self.heads = {"speech": model.speech_cfm, "motion": model.motion_cfm}
        self.encoders = {"speech": model.speech_tokens, "motion": model.motion_tokens}
        streams = [s for s in ("speech", "motion") if getattr(mode, s) == "generated"]
        context = {s: last_frames([getattr(r, s) for r in requests], c.context * size, size) for s in streams}
        conditions = {"speech": [r.speaker for r in requests], "motion": [r.first_motion for r in requests]}
        self.conditions = {s: torch.stack(conditions[s]) for s in streams}
        self.schedules = {s: self.heads[s].schedule(sampling.steps, guidance=sampling.guidance) for s in streams}
        if noise is None:
            channels = {"speech": c.speech_dim, "motion": c.motion_dim}
            noise = {s: seeded_noise(requests, s, (channels[s], size), self.steps) for s in streams}
        self.noise = {stream: value.to(device) for stream, value in noise.items()}
        self.drawn: dict[Stream, list[Tensor]] = {s: [] for s in streams}

        # Prompts of different lengths are padded on the left.
        self.padding = torch.tensor([longest - len(prompt) for prompt in self.prompts], device=device)[:, None]
        self.state = LoopState(
            cache=StaticCache(model.llm.config, max_cache_len=self.capacity),
            hidden=torch.empty(0),
            context=context,
            index=torch.zeros((), dtype=torch.long, device=device),
            hits=torch.zeros(len(requests), dtype=torch.long, device=device),
            end=torch.tensor(self.limits, device=device),
        )
        padded = torch.stack([F.pad(prompt, (0, 0, longest - len(prompt), 0)) for prompt in self.prompts])
        self._advance(padded, torch.arange(longest, device=device))

    @torch.no_grad()
    def __iter__(self) -> Iterator[Step]:
        ends = self.limits
        for index in range(self.steps):
            last = index + 1 == self.steps
            running = sum(end > index for end in ends)
            numbers = {"speech": index, "motion": index - self.delay}
            noise = {stream: self.noise[stream][numbers[stream]] for stream in self.drawn if numbers[stream] >= 0}
            self.before_step(index)
            hidden = self.state.hidden
            patches, token, stop = self.run_step(noise, self.known[index], last)
            for stream, patch in patches.items():
                self.drawn[stream].append(patch)
            yield Step(index, running, hidden, patches.get("speech"), patches.get("motion"), token, stop)
            if self.asks_stop and not last and (index + 1) % self.check_every == 0:
                ends = self.state.end.tolist()
                if max(ends) <= index + 1:
                    return

    def before_step(self, index: int) -> None:
        """Nothing here; see `particles.ParticleLoop`."""

    def step(
        self, noise: Mapping[Stream, Tensor], known: Tensor, last: bool
    ) -> tuple[dict[Stream, Tensor], Tensor, Tensor | None]:
        """One patch of all rows: both solvers, both encoders, backbone, stop test. Nothing is read by the host.

        Args:
            noise: (B, C, P) of each stream that is drawn in this step.
            known: (B, D) part of the token that does not depend on what is drawn; (B, 2, D) if a patch is two tokens.
            last: the token is not fed back.

        Returns:
            New patches (B, P, C), the (last) token (B, D), and the probability (B,) of the end if it is tested.
        """
        state, token, patches = self.state, known, {}
        if self.per_patch == 1:
            for stream, z in noise.items():
                patches[stream], drawn = self._draw(stream, z)
                token = token + drawn
            if not last:
                self._advance(token[:, None], self.longest + state.index[None])
        else:
            for i, stream in enumerate(ORDERS[self.model.config.order]):
                token = known[:, i]
                if stream in noise:
                    patches[stream], token = self._draw(stream, noise[stream])
                if i == 0 or not last:
                    self._advance(token[:, None], self.longest + 2 * state.index[None] + i)
        if last:
            return patches, token, None
        state.index = state.index + 1
        if not self.asks_stop:
            return patches, token, None
        stop = self.model.head_stop(state.hidden).sigmoid()
        hit = (stop >= 0.5) & (state.index >= self.first_test)
        state.hits = torch.where(hit, state.hits + 1, 0)
        ended = state.hits >= self.rules.stop_hits
        state.end = torch.where(ended, torch.minimum(state.end, state.index), state.end)
        return patches, token, stop

    def _draw(self, stream: Stream, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The next patch (B, P, C) of a stream, from noise (B, C, P), and its token (B, D); it joins the context."""
        hidden, context = self.state.hidden, self.state.context
        patch, token, context[stream] = self.draw(stream, noise, hidden, context[stream], self.conditions[stream])
        return patch, token

    def draw(
        self, stream: Stream, noise: Tensor, hidden: Tensor, context: Tensor, condition: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next patch (B, P, C) of a stream, its token (B, D), and the context after it.

        Args:
            noise: (B, C, P). hidden: (B, D). context: (B, p P, C) frames before the patch.
            condition: of each row: the speaker's embedding or the first frame of the motion.
        """
        s = self.sampling
        with half_precision(noise.device, self.model.dtype):
            patch = (
                self.heads[stream]
                .sample(
                    hidden, context.transpose(1, 2), condition, noise, self.schedules[stream], s.temperature, s.guidance
                )
                .transpose(1, 2)
            )
            return patch, self.encoders[stream](patch), torch.cat([context, patch], 1)[:, patch.shape[1] :]

    def results(self) -> list[Result]:
        """The new frames of each row, up to its end."""
        streams = {stream: torch.stack(drawn, 1) for stream, drawn in self.drawn.items() if drawn}  # (B, M, P, C)
        out = []
        for row, (end, limit) in enumerate(zip(self.state.end.tolist(), self.limits)):
            counts = {"speech": end - self.delay if self.rules.trim else end, "motion": end - self.delay}
            frames = {stream: value[row, : counts[stream]].flatten(0, 1) for stream, value in streams.items()}
            out.append(Result(frames.get("speech"), frames.get("motion"), end < limit))
        return out

    def _advance(self, embeds: Tensor, place: Tensor) -> None:
        """Run the backbone over tokens (B, Q, D) at the places (Q,) of the cache; keeps the last hidden state."""
        key = torch.arange(self.capacity, device=embeds.device)
        visible = (key >= self.padding)[:, None] & (key <= place[:, None])  # (B, Q, N)
        if len(place) > 1:
            visible = visible | (key == place[:, None])  # a padding token sees itself: no softmax over nothing
        positions = (place - self.padding).clamp(min=0)
        self.state.hidden = self.model.continue_cache(self.state.cache, embeds, visible, positions)


def generate(
    model: TalkerT2AV,
    requests: Sequence[Request],
    mode: Mode,
    sampling: Sampling,
    rules: LoopRules = PAPER,
    use_stop: bool = True,
    check_every: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> list[Result]:
    """Run a `PatchLoop` to its end; gives the new frames of each row. `on_step` is called after every step."""
    loop = PatchLoop(model, requests, mode, sampling, rules, use_stop=use_stop, check_every=check_every)
    for step in loop:
        if on_step is not None:
            on_step(step)
    return loop.results()


def last_frames(frames: Sequence[Tensor], count: int, size: int) -> Tensor:
    """(B, count, C): the last frames of each row, whole patches of `size` of them; zeros where there are fewer."""
    whole = [F.pad(x, (0, 0, count, -len(x) % size)) for x in frames]
    return torch.stack([x[len(x) - count :] for x in whole])


def _to_device(request: Request, device: torch.device) -> Request:
    tensors = {name: value.to(device) for name, value in vars(request).items() if isinstance(value, Tensor)}
    return replace(request, **tensors)
