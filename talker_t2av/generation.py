"""One autoregressive loop for four jobs: T2AV, TTS, A2V and V2A. A patch of 160 ms a step.

A mode says of speech and of motion whether it is generated, given or absent. The text is a prefix; frames of a
generated stream that are given are its beginning, which it continues. Slot j of the sequence holds speech patch j and
motion patch j - delay, as in training; of a given stream it holds patch j + 1 if the model has tasks for that, so that
a patch is drawn with the other stream's patch of its time known. Slots that are known beforehand enter the backbone
together.

The end: training labels the hidden state after the last slot's token as the stop, and leaves the two states before it
without a label. So the first hit ends an utterance, and the patches before it are all of it. The official program waits
for three hits in a row and keeps what it drew meanwhile (`SCRIPT` and the other two).

Axes: B rows, b rows that go on, T prompt tokens, S slots, M patches, P frames of a patch, F frames, C channels (Ds of
speech, Dm of motion), G speaker embedding, p context patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import UserError
from engine.seeding import generator_for
from talker_t2av.kv_cache import KVCache
from talker_t2av.layers import with_enough_rows
from talker_t2av.model import A2V, T2AV, TTS, V2A, TalkerT2AV
from talker_t2av.request import PAPER, Compat, Mode, Request, Sampling

Stream = Literal["speech", "motion"]
Noise = Callable[[Stream, int, int], Tensor]  # (stream, row, number of the new patch) -> (C, P)


@dataclass(frozen=True)
class Step:
    """What one turn of the loop did.

    Attributes:
        index: of the step.
        ended: rows that are over, and after how many steps; they were in the batch until now.
        rows: those that went on, b of them; none in the last turn if the stop head ended the batch.
        stop: probability of the end for the rows that were in the batch until now, None where it was not tested.
        hidden: (b, D) state that the heads saw.
        speech, motion: (b, P, C) new patches; None where a stream had none.
        token: (b, D) that goes back into the backbone; None without rows.
    """

    index: int
    ended: dict[int, int]
    rows: list[int]
    stop: Tensor | None
    hidden: Tensor
    speech: Tensor | None = None
    motion: Tensor | None = None
    token: Tensor | None = None


@dataclass(frozen=True)
class Result:
    """New frames of one row, without the prefix: speech (F, Ds) and motion (F, Dm) normalised, or None.

    stopped: the stop head ended it, not the limit.
    """

    speech: Tensor | None
    motion: Tensor | None
    stopped: bool


class Given:
    """Tokens of the frames that are given of one stream, row by row; a slot without frames has the token of no frame.

    A token of no frame is not zero: the encoder is trained to see it before and after a stream.
    """

    def __init__(self, encode: Callable[[Tensor, Tensor], Tensor], frames: Sequence[Tensor], patch_size: int) -> None:
        self.counts = [-(-len(x) // patch_size) for x in frames]
        longest = max(self.counts) + 1  # the last column stays empty in every row
        padded = torch.stack([F.pad(x, (0, 0, 0, longest * patch_size - len(x))) for x in frames])
        lengths = torch.tensor([len(x) for x in frames], device=padded.device)
        valid = torch.arange(longest * patch_size, device=padded.device) < lengths[:, None]
        self.tokens = encode(padded.unflatten(1, (-1, patch_size)), valid.unflatten(1, (-1, patch_size)))  # (B, M, D)

    def slots(self, row: int, first: int, count: int) -> Tensor:
        """(count, D): tokens of patches first, first + 1, ... of a row."""
        patches = torch.arange(first, first + count, device=self.tokens.device)
        patches = torch.where((patches < 0) | (patches >= self.counts[row]), self.tokens.shape[1] - 1, patches)
        return self.tokens[row, patches]

    def at(self, rows: Sequence[int], patches: Sequence[int]) -> Tensor:
        """(b, D): the token of one patch of each row."""
        return torch.cat([self.slots(row, patch, 1) for row, patch in zip(rows, patches)])


def seeded_noise(model: TalkerT2AV, requests: Sequence[Request]) -> Noise:
    """Noise that depends on a row's seed, the stream and the patch, and on nothing else."""
    c = model.config
    channels = {"speech": c.speech_dim, "motion": c.motion_dim}

    def noise(stream: Stream, row: int, patch: int) -> Tensor:
        generator = generator_for(requests[row].seed, stream, patch)
        return torch.randn(channels[stream], c.patch_size, generator=generator)

    return noise


@dataclass(frozen=True)
class Plan:
    """A mode's row of the task embedding, and which patch of each stream slot 0 holds."""

    task: int
    speech: int = 0
    motion: int = 0

    @classmethod
    def of(cls, model: TalkerT2AV, mode: Mode) -> Plan:
        delay = model.config.delay
        if mode.motion == "absent":
            return cls(TTS)
        if model.config.tasks > 2 and not mode.open_ended:
            return cls(V2A, motion=1) if mode.motion == "given" else cls(A2V, speech=1, motion=-delay)
        return cls(T2AV, motion=-delay)

    @property
    def first_slot(self) -> int:
        """-1 where the token before the slots holds something, too."""
        return -1 if self.task in (V2A, A2V) else 0


def prefill(
    model: TalkerT2AV,
    requests: Sequence[Request],
    mode: Mode,
    compat: Compat,
    speech: Given,
    motion: Given | None,
) -> list[Tensor]:
    """What enters the backbone before the first step, (T, D) for each row: task, text, slots known beforehand."""
    plan = Plan.of(model, mode)
    task, first = model.task_embedding.weight[plan.task], plan.first_slot
    rows = []
    for row, request in enumerate(requests):
        ids = torch.tensor(request.prompt, device=task.device)
        slots = speech.slots(row, first + plan.speech, request.prefix - first)
        if mode.motion == "absent":
            slots = slots + model.motion_pad_emb[0]
        elif compat.prefix_motion:
            slots = slots + motion.slots(row, first + plan.motion, request.prefix - first)
        if not compat.prepend_task:
            slots = torch.cat([slots[:1] + task, slots[1:]]) if len(slots) else slots
        before = model.embed_text(ids[None])[0]
        if compat.prepend_task:
            before = torch.cat([task[None], before])
        if first:
            before, slots = torch.cat([before[:-1], before[-1:] + slots[:1]]), slots[1:]
        rows.append(torch.cat([before, slots]))
    return rows


def step_limit(model: TalkerT2AV, request: Request, mode: Mode) -> int:
    """Steps after which a row ends at the latest. Motion lags by `delay` slots, which come on top."""
    size, delay = model.config.patch_size, model.config.delay
    if mode.speech == "given":
        return -(-len(request.speech) // size) + delay - request.prefix
    if mode.motion == "given":
        return -(-len(request.motion) // size) - request.prefix
    return request.max_patches + (delay if mode.motion == "generated" else 0)


@torch.no_grad()
def generate_steps(
    model: TalkerT2AV,
    requests: Sequence[Request],
    mode: Mode,
    sampling: Sampling,
    compat: Compat = PAPER,
    noise: Noise | None = None,
    use_stop: bool = True,
    check_every: int = 1,
) -> Iterator[Step]:
    """The loop. Rows that have ended leave the batch, and the last token is not fed back.

    Args:
        noise: given noise; by default it comes from each row's seed.
        use_stop: let the stop head end rows of open-ended modes.
        check_every: steps between two looks at the stop head's verdict, each of which makes an accelerator wait for
            the host. Rows may then go on past their end; `Step.ended` says which steps count.

    Raises:
        UserError: a row asks for no patch, or for more tokens than the backbone has positions.
    """
    c, device = model.config, model.task_embedding.weight.device
    requests = [_on(request, device) for request in requests]
    noise = noise or seeded_noise(model, requests)
    delay = c.delay if mode.motion == "generated" else 0
    testing = use_stop and mode.open_ended
    limits = [step_limit(model, request, mode) for request in requests]
    first_tests = [max(compat.first_test, request.min_patches + delay) for request in requests]
    plan = Plan.of(model, mode)
    speech, motion = given_tokens(model, requests, mode)
    prompts = prefill(model, requests, mode, compat, speech, motion)
    longest = max(map(len, prompts))
    _check_lengths(model, longest, limits)
    padding = [longest - len(prompt) for prompt in prompts]
    cache = KVCache(padding, longest + max(limits), device)
    hidden = cache.feed(model, torch.stack([F.pad(x, (0, 0, n, 0)) for x, n in zip(prompts, padding)]))

    rows = list(range(len(requests)))
    heads = {"speech": model.speech_cfm, "motion": model.motion_cfm}
    state = {
        "speech": _tail([r.speech for r in requests], c.context * c.patch_size, c.patch_size),
        "speech cond": torch.stack([r.speaker for r in requests]),
        "hits": torch.zeros(len(requests), dtype=torch.long, device=device),
        "end": torch.tensor(limits, device=device),
    }
    if mode.motion == "generated":
        state["motion"] = _tail([r.motion for r in requests], c.context * c.patch_size, c.patch_size)
        state["motion cond"] = torch.stack([r.first_motion for r in requests])

    def draw(stream: Stream, number: int) -> Tensor:
        """The next patch (b, P, C) of each row, which joins the stream's history."""
        z = torch.stack([noise(stream, row, number) for row in rows]).to(device)
        given = (hidden, state[stream].transpose(1, 2), state[f"{stream} cond"])
        patch = heads[stream].sample(*given, z, sampling.steps, sampling.temperature, sampling.guidance)
        patch = patch.transpose(1, 2)
        state[stream] = torch.cat([state[stream], patch], 1)[:, c.patch_size :]
        return patch

    for index in range(max(limits)):
        ends, stop = [limits[row] for row in rows], None
        tested = [testing and index >= first_tests[row] for row in rows]
        if any(tested):
            stop = model.head_stop(hidden).sigmoid()
            hit = (stop >= 0.5) & torch.tensor(tested, device=device)
            state["hits"] = torch.where(hit, state["hits"] + 1, 0)
            state["end"] = torch.where(state["hits"] >= compat.stop_hits, state["end"].clamp(max=index), state["end"])
            if index % check_every == 0:
                ends = state["end"].tolist()
        ended = {row: end for row, end in zip(rows, ends) if end <= index}
        if ended:
            keep = torch.tensor([i for i, row in enumerate(rows) if row not in ended], dtype=torch.long, device=device)
            rows = [row for row in rows if row not in ended]
            state = {name: value[keep] for name, value in state.items()}
            hidden = hidden[keep]
            cache.select(keep)
            if not rows:
                yield Step(index, ended, rows, stop, hidden)
                return

        slots = [requests[row].prefix + index for row in rows]
        new_speech = new_motion = None
        if mode.speech == "generated":
            new_speech = draw("speech", index)
            token = with_enough_rows(model.speech_tokens, new_speech)
        else:
            token = speech.at(rows, [slot + plan.speech for slot in slots])
        if mode.motion == "generated" and index >= delay:
            new_motion = draw("motion", index - delay)
            token = token + with_enough_rows(model.motion_tokens, new_motion)
        elif mode.motion == "absent":
            token = token + model.motion_pad_emb[0]
        elif not compat.motion_waits:
            token = token + motion.at(rows, [slot + plan.motion for slot in slots])
        yield Step(index, ended, rows, stop, hidden, new_speech, new_motion, token)
        if index + 1 < max(limits[row] for row in rows):
            hidden = cache.feed(model, token[:, None])


def generate(
    model: TalkerT2AV,
    requests: Sequence[Request],
    mode: Mode,
    sampling: Sampling,
    compat: Compat = PAPER,
    noise: Noise | None = None,
    use_stop: bool = True,
    check_every: int | None = None,
) -> list[Result]:
    """Run the loop to its end; the new frames of each row. Arguments as those of `generate_steps`.

    check_every: by default every step on the CPU, where a patch in vain costs more than a look, else every 4 steps.
    """
    device = model.task_embedding.weight.device
    check_every = check_every or (1 if device.type == "cpu" else 4)
    collect = Collector(model, requests, mode, compat)
    for step in generate_steps(model, requests, mode, sampling, compat, noise, use_stop, check_every):
        collect.add(step)
    return collect.results()


class Collector:
    """Gathers the patches of the loop by row."""

    def __init__(self, model: TalkerT2AV, requests: Sequence[Request], mode: Mode, compat: Compat = PAPER) -> None:
        self.delay = model.config.delay if mode.motion == "generated" else 0
        self.mode, self.compat = mode, compat
        self.limits = [step_limit(model, request, mode) for request in requests]
        self.ends = list(self.limits)
        self.patches: dict[str, list[list[Tensor]]] = {s: [[] for _ in requests] for s in ("speech", "motion")}

    def add(self, step: Step) -> None:
        for row, end in step.ended.items():
            self.ends[row] = end
        for stream, new in (("speech", step.speech), ("motion", step.motion)):
            if new is not None:
                for row, patch in zip(step.rows, new):
                    self.patches[stream][row].append(patch)

    def results(self) -> list[Result]:
        out = []
        for row, (end, limit) in enumerate(zip(self.ends, self.limits)):
            speech = self.patches["speech"][row][: end - self.delay if self.compat.trim else end]
            motion = self.patches["motion"][row][: end - self.delay]
            out.append(
                Result(
                    torch.cat(speech) if self.mode.speech == "generated" else None,
                    torch.cat(motion) if self.mode.motion == "generated" else None,
                    end < limit,
                )
            )
        return out


def given_tokens(model: TalkerT2AV, requests: Sequence[Request], mode: Mode) -> tuple[Given, Given | None]:
    """Tokens of the given frames of both streams."""
    size = model.config.patch_size
    speech = Given(model.speech_tokens, [r.speech for r in requests], size)
    return speech, None if mode.motion == "absent" else Given(model.motion_tokens, [r.motion for r in requests], size)


def _tail(frames: Sequence[Tensor], count: int, size: int) -> Tensor:
    """(B, count, C): the last frames of each row, whole patches of `size` of them; zeros where there are fewer."""
    whole = [F.pad(x, (0, 0, count, -len(x) % size)) for x in frames]
    return torch.stack([x[len(x) - count :] for x in whole])


def _on(request: Request, device: torch.device) -> Request:
    tensors = {name: value.to(device) for name, value in vars(request).items() if isinstance(value, Tensor)}
    return replace(request, **tensors)


def _check_lengths(model: TalkerT2AV, longest: int, limits: Sequence[int]) -> None:
    if min(limits) < 1:
        raise UserError(f"nothing to generate: {min(limits)} patches are left after the prefix")
    most = model.llm.config.max_position_embeddings
    if longest + max(limits) > most:
        raise UserError(f"{longest} tokens of text and prefix and {max(limits)} patches exceed {most}: give less text")
