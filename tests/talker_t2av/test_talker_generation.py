"""The loop: it does what training does, in all modes; batches change nothing; ends and guards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from talker_fixtures import all_frames, assert_close, generate, request, tiny_model, utterance

from engine.errors import UserError
from talker_t2av.generation import Rows
from talker_t2av.losses import training_forward
from talker_t2av.request import MODES, Sampling

SAMPLING = Sampling(steps=3, temperature=0.8, guidance=1.5)


def hidden_states(model, asked, mode):
    """The result of a request without stop tests, and the states (S, D) that the heads saw."""
    rows, states = Rows(model, MODES[mode], SAMPLING, use_stop=False), []
    row = rows.join(asked)
    while rows.rows:
        states.append(rows.state.hidden.clone())
        rows.step()
    return rows.result(row), torch.cat(states)


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("tasks", [2, 4])
def test_hidden_states_are_those_of_training(mode, delay, prefix, tasks):
    """What the heads see equals the training forward on the finished utterance."""
    model, size, patches = tiny_model(delay, tasks=tasks), 4, 6
    given = {
        "t2av": (4 * prefix, 4 * prefix),
        "tts": (4 * prefix, 0),
        "a2v": (4 * (prefix + patches) - 1, 4 * prefix),
        "v2a": (4 * prefix, 4 * (prefix + patches)),
    }[mode]
    asked = request(speech=given[0], motion=given[1], prefix=prefix, max_patches=patches)
    result, ours = hidden_states(model, asked, mode)
    speech, motion = all_frames(asked, result)
    assert -(-len(speech) // size) == prefix + patches
    assert len(motion) == (0 if mode == "tts" else 4 * (prefix + patches))
    slots = prefix + patches + (delay if mode != "tts" else 0)
    start = len(asked.prompt)
    with torch.no_grad():
        task = torch.tensor([("tts", "t2av", "v2a", "a2v").index(mode)]) if tasks == 4 else None
        forward = training_forward(model, utterance(asked, speech, motion, slots), task)
    # The state before slot j is at position start + j, as the task token comes first.
    same = patches if mode == "t2av" else len(ours)  # later slots hold speech that is trimmed
    theirs = forward.hidden[0, start + prefix : start + prefix + same]
    torch.testing.assert_close(ours[:same], theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("delay", "tasks"), [(0, 2), (1, 2), (1, 4)])
@pytest.mark.parametrize("mode", MODES)
def test_eight_rows_at_once_are_eight_rows_one_by_one(mode, delay, tasks):
    model = tiny_model(delay, context=2, tasks=tasks)
    rows = []
    for seed in range(8):
        prefix = seed % 3
        streams = {"t2av": (prefix, prefix), "tts": (prefix, 0), "a2v": (prefix + 2 + seed, prefix)}
        speech, motion = streams.get(mode, (prefix, prefix + 9 - seed))
        rows.append(
            request(
                3 + 2 * seed,
                seed,
                4 * speech,
                4 * motion,
                prefix=prefix,
                max_patches=4 + seed,
                min_patches=1 + seed % 4,
            )
        )
    together = generate(model, rows, MODES[mode], SAMPLING)
    lengths = set()
    for row, result in zip(rows, together):
        alone = generate(model, [row], MODES[mode], SAMPLING)[0]
        assert_close(alone, result, 1e-4)
        lengths |= {len(x) for x in (alone.speech, alone.motion) if x is not None}
    assert len(lengths) > 2  # rows did end at different times


@pytest.mark.parametrize(("tasks", "known"), [(2, 0), (4, 1)])
@pytest.mark.parametrize("mode", ["v2a", "a2v"])
def test_a_patch_is_drawn_with_the_given_patch_of_its_time_known_if_there_are_tasks_for_it(mode, tasks, known):
    model, changed = tiny_model(tasks=tasks), 3
    given = "motion" if mode == "v2a" else "speech"
    asked = request(**{given: 24})
    stream = getattr(asked, given).clone()
    stream[4 * changed] += 1.0
    states = [hidden_states(model, row, mode)[1] for row in (asked, replace(asked, **{given: stream}))]
    same = [torch.equal(a, b) for a, b in zip(*states)]
    assert same.index(False) == changed + 1 - known


class Verdicts(torch.nn.Module):
    """A stop head with a script: one probability a step, of the end after it."""

    def __init__(self, hits: str) -> None:
        super().__init__()
        self.hits = iter(hits)

    def forward(self, hidden):
        return torch.full((len(hidden),), 9.0 if next(self.hits) == "x" else -9.0)


@pytest.mark.parametrize("delay", [0, 2])
def test_the_first_hit_ends_a_row_and_what_lags_is_trimmed(delay):
    model = tiny_model(delay)
    model.head_stop = Verdicts("x" * (1 + delay) + "...x")
    result = generate(model, [request(min_patches=2, max_patches=30)], MODES["t2av"], SAMPLING)[0]
    # tests count from slot 2 + delay on, and the fourth one hits: 5 + delay slots, the last `delay` for motion alone
    assert result.stopped and len(result.speech) == len(result.motion) == 4 * 5


@pytest.mark.parametrize("check_every", [1, 2, 4, 9])
def test_a_stop_between_two_reads_is_not_lost_at_the_limit_nor_late_in_a_stream(check_every):
    model = tiny_model()
    model.head_stop = Verdicts("....x..")
    rows = [request(max_patches=7), request(max_patches=3)]
    one, other = generate(model, rows, MODES["tts"], SAMPLING, check_every=check_every)
    assert one.stopped and len(one.speech) == 4 * 5
    assert not other.stopped and len(other.speech) == 4 * 3
    model.head_stop = Verdicts("....x..")
    assert len(list(Rows(model, MODES["tts"], SAMPLING, check_every=check_every).stream(rows[0]))) == 5


def test_limits():
    model = tiny_model()
    model.head_stop = Verdicts("." * 99)
    result = generate(model, [request(max_patches=5)], MODES["tts"], SAMPLING)[0]
    assert not result.stopped and len(result.speech) == 20 and result.motion is None
    with pytest.raises(UserError, match="nothing to generate"):
        generate(model, [request(max_patches=0)], MODES["tts"], SAMPLING)
    with pytest.raises(UserError, match="less text"):
        generate(model, [request(length=510, max_patches=5)], MODES["tts"], SAMPLING)


def test_another_seed_is_another_utterance():
    model, first = tiny_model(), request(max_patches=3, min_patches=3)
    one, other = (generate(model, [x], MODES["t2av"], SAMPLING)[0] for x in (first, replace(first, seed=5)))
    assert not torch.allclose(one.speech, other.speech, atol=1e-2)


def test_half_precision_is_close_and_repeats_itself():
    model, rows = tiny_model(), [request(max_patches=3, seed=s) for s in (1, 2)]
    full = generate(model, rows, MODES["t2av"], SAMPLING, use_stop=False)
    half = tiny_model().to_precision(torch.bfloat16)
    assert half.dtype == half.speech_cfm.estimator.decoder.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert half.head_stop.proj.weight.dtype == half.llm.model.rotary_emb.inv_freq.dtype == torch.float32
    first, again = (generate(half, rows, MODES["t2av"], SAMPLING, use_stop=False) for _ in range(2))
    for a, b, c in zip(full, first, again):
        assert torch.equal(b.speech, c.speech) and torch.equal(b.motion, c.motion)
        assert b.speech.dtype == torch.float32 and not torch.equal(a.speech, b.speech)
        torch.testing.assert_close(a.speech, b.speech, atol=0.1, rtol=0.05)
        torch.testing.assert_close(a.motion, b.motion, atol=0.1, rtol=0.05)
