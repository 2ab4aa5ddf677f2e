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
Dm of motion), N tokens that the cache holds, p context patches, D width.
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
from engine.seeding import generator_for
from talker_t2av.model import A2V, T2AV, V2A, TalkerT2AV
from talker_t2av.request import PAPER, LoopRules, Mode, Request, Sampling

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


class EncodedStream:
    """Tokens of the given frames of one stream. A patch without frames has the token of zero frames.

    The token of zero frames is not zero: in training the encoder sees it before and after a stream.
    """

    def __init__(self, encode: Callable[[Tensor, Tensor], Tensor], frames: Sequence[Tensor], patch_size: int) -> None:
        self.counts = [-(-len(x) // patch_size) for x in frames]
        longest = max(self.counts) + 1  # the last column stays empty in every row
        padded = torch.stack([F.pad(x, (0, 0, 0, longest * patch_size - len(x))) for x in frames])
        lengths = torch.tensor([len(x) for x in frames], device=padded.device)
        valid = torch.arange(longest * patch_size, device=padded.device) < lengths[:, None]
        self.tokens = encode(padded.unflatten(1, (-1, patch_size)), valid.unflatten(1, (-1, patch_size)))  # (B, M, D)

    def patches(self, row: int, first: int, count: int) -> Tensor:
        """(count, D): tokens of patches first, first + 1, ... of a row."""
        patches = torch.arange(first, first + count, device=self.tokens.device)
        patches = torch.where((patches < 0) | (patches >= self.counts[row]), self.tokens.shape[1] - 1, patches)
        return self.tokens[row, patches]


class KnownSlots:
    """The part of every slot's token that is known before the loop: prefix, given streams, missing motion."""

    def __init__(self, model: TalkerT2AV, requests: Sequence[Request], mode: Mode) -> None:
        size = model.config.patch_size
        self.model, self.requests, self.mode = model, requests, mode
        self.task = mode.task if mode.task < model.config.tasks else T2AV
        self.speech_shift = int(self.task == A2V)  # the patch in slot 0
        self.motion_shift = 1 if self.task == V2A else -model.config.delay
        self.speech = EncodedStream(model.speech_tokens, [r.speech for r in requests], size)
        self.motion = None
        if mode.motion != "absent":
            self.motion = EncodedStream(model.motion_tokens, [r.motion for r in requests], size)

    def prompt(self, row: int) -> Tensor:
        """(T, D): task, text and prefix of a row."""
        model, request = self.model, self.requests[row]
        ids = torch.tensor(request.prompt, dtype=torch.long, device=model.device)
        task = model.task_embedding.weight[self.task]
        first = -1 if self.task in (A2V, V2A) else 0  # the token before slot 0 holds the given stream's first patch
        slots = self.speech.patches(row, first + self.speech_shift, request.prefix - first)
        if self.motion is None:
            slots = slots + model.motion_pad_emb[0]
        elif request.prefix_has_motion:
            slots = slots + self.motion.patches(row, first + self.motion_shift, request.prefix - first)
        before = model.embed_text(ids[None])[0]
        if request.task_first:
            before = torch.cat([task[None], before])
        elif len(slots):
            slots = torch.cat([slots[:1] + task, slots[1:]])
        if first:
            before, slots = torch.cat([before[:-1], before[-1:] + slots[:1]]), slots[1:]
        return torch.cat([before, slots])

    def later(self, steps: int, waits: bool) -> Tensor:
        """(S, B, D): of the slots after the prefix. waits: see `LoopRules.motion_waits`."""
        rows = []
        for row, request in enumerate(self.requests):
            tokens = self.speech.tokens.new_zeros(steps, self.model.width)
            if self.mode.speech == "given":
                tokens = tokens + self.speech.patches(row, request.prefix + self.speech_shift, steps)
            if self.motion is None:
                tokens = tokens + self.model.motion_pad_emb[0]
            elif self.mode.motion == "given" or not waits:
                known = self.motion.patches(row, request.prefix + self.motion_shift, steps)
                if self.mode.motion == "generated":
                    known[self.model.config.delay :] = 0  # from here on motion is drawn
                tokens = tokens + known
            rows.append(tokens)
        return torch.stack(rows, 1)


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

    Attributes:
        limits: steps after which each row ends at the latest.

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
    ) -> None:
        c, device = model.config, model.device
        requests = [_on(request, device) for request in requests]
        self.model, self.mode, self.sampling, self.rules = model, mode, sampling, rules
        self.check_every = check_every or (1 if device.type == "cpu" else 4)
        self.testing = use_stop and mode.open_ended
        self.delay = c.delay if mode.motion == "generated" else 0
        self.limits = [step_limit(model, request, mode) for request in requests]
        self.steps = max(self.limits)
        if min(self.limits) < 1:
            raise UserError(f"nothing to generate: {min(self.limits)} patches are left after the prefix")
        first_tests = [max(rules.first_test, request.min_patches + self.delay) for request in requests]
        self.first_test = torch.tensor(first_tests, device=device)

        known = KnownSlots(model, requests, mode)
        prompts = [known.prompt(row) for row in range(len(requests))]
        longest = max(map(len, prompts))
        most = model.llm.config.max_position_embeddings
        if longest + self.steps > most:
            raise UserError(
                f"{longest} tokens of text and prefix and {self.steps} patches exceed {most}: give less text"
            )
        self.known = known.later(self.steps, rules.motion_waits)
        context, self.conditions = {}, {}
        if mode.speech == "generated":
            context["speech"] = last_frames([r.speech for r in requests], c.context * c.patch_size, c.patch_size)
            self.conditions["speech"] = torch.stack([r.speaker for r in requests])
        if mode.motion == "generated":
            context["motion"] = last_frames([r.motion for r in requests], c.context * c.patch_size, c.patch_size)
            self.conditions["motion"] = torch.stack([r.first_motion for r in requests])
        self.heads = {"speech": model.speech_cfm, "motion": model.motion_cfm}
        self.encoders = {"speech": model.speech_tokens, "motion": model.motion_tokens}
        self.schedules = {stream: self.heads[stream].schedule(sampling.steps) for stream in context}
        if noise is None:
            channels = {"speech": c.speech_dim, "motion": c.motion_dim}
            noise = {s: seeded_noise(requests, s, (channels[s], c.patch_size), self.steps) for s in context}
        self.noise = {stream: value.to(device) for stream, value in noise.items()}
        self.drawn: dict[Stream, list[Tensor]] = {stream: [] for stream in context}

        # Prompts of different lengths are padded on the left.
        self.padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)[:, None]
        self.longest = longest
        self.state = LoopState(
            cache=StaticCache(model.llm.config, max_cache_len=longest + self.steps),
            hidden=torch.empty(0),
            context=context,
            index=torch.zeros((), dtype=torch.long, device=device),
            hits=torch.zeros(len(requests), dtype=torch.long, device=device),
            end=torch.tensor(self.limits, device=device),
        )
        padded = torch.stack([F.pad(prompt, (0, 0, longest - len(prompt), 0)) for prompt in prompts])
        self._advance(padded, torch.arange(longest, device=device))

    @torch.no_grad()
    def __iter__(self) -> Iterator[Step]:
        ends = self.limits
        for index in range(self.steps):
            last = index + 1 == self.steps
            running = sum(end > index for end in ends)
            numbers = {"speech": index, "motion": index - self.delay}
            noise = {stream: self.noise[stream][numbers[stream]] for stream in self.drawn if numbers[stream] >= 0}
            hidden = self.state.hidden
            patches, token, stop = self.step(noise, self.known[index], last)
            for stream, patch in patches.items():
                self.drawn[stream].append(patch)
            yield Step(index, running, hidden, patches.get("speech"), patches.get("motion"), token, stop)
            if self.testing and not last and (index + 1) % self.check_every == 0:
                ends = self.state.end.tolist()
                if max(ends) <= index + 1:
                    return

    def step(
        self, noise: Mapping[Stream, Tensor], known: Tensor, last: bool
    ) -> tuple[dict[Stream, Tensor], Tensor, Tensor | None]:
        """One patch of all rows: both solvers, both encoders, backbone, stop test. Nothing is read by the host.

        Args:
            noise: (B, C, P) of each stream that is drawn in this step.
            known: (B, D) part of the token that does not depend on what is drawn.
            last: the token is not fed back.

        Returns:
            New patches (B, P, C), the token (B, D), and the probability (B,) of the end if it is tested.
        """
        state, s, token, patches = self.state, self.sampling, known, {}
        for stream, z in noise.items():
            context, condition = state.context[stream].transpose(1, 2), self.conditions[stream]
            patch = self.heads[stream].sample(
                state.hidden, context, condition, z, self.schedules[stream], s.temperature, s.guidance
            )
            patches[stream] = patch = patch.transpose(1, 2)
            state.context[stream] = torch.cat([state.context[stream], patch], 1)[:, patch.shape[1] :]
            token = token + self.encoders[stream](patch)
        if last:
            return patches, token, None
        self._advance(token[:, None], self.longest + state.index[None])
        state.index = state.index + 1
        if not self.testing:
            return patches, token, None
        stop = self.model.head_stop(state.hidden).sigmoid()
        hit = (stop >= 0.5) & (state.index >= self.first_test)
        state.hits = torch.where(hit, state.hits + 1, 0)
        ended = state.hits >= self.rules.stop_hits
        state.end = torch.where(ended, torch.minimum(state.end, state.index), state.end)
        return patches, token, stop

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
        key = torch.arange(self.longest + self.steps, device=embeds.device)
        visible = (key >= self.padding)[:, None] & (key <= place[:, None])  # (B, Q, N)
        if len(place) > 1:
            visible = visible | (key == place[:, None])  # a padding token sees itself: no softmax over nothing
        self.state.hidden = self.model.backbone(
            embeds,
            {"full_attention": visible[:, None]},  # given by layer type, a mask is taken as it is
            position_ids=(place - self.padding).clamp(min=0),
            past_key_values=self.state.cache,
            use_cache=True,
        )[:, -1]


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


def _on(request: Request, device: torch.device) -> Request:
    tensors = {name: value.to(device) for name, value in vars(request).items() if isinstance(value, Tensor)}
    return replace(request, **tensors)
