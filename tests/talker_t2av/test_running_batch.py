"""Rows that join and leave a running batch give what they give alone."""

import pytest
import torch
from talker_fixtures import request, tiny_model

from engine.errors import UserError
from talker_t2av.generation import generate
from talker_t2av.request import MODES, PAPER, LoopRules, Sampling
from talker_t2av.running_batch import ROOM, RunningBatch

SAMPLING = Sampling(steps=3, temperature=0.8, guidance=1.5)


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("mode", ["t2av", "tts"])
def test_rows_that_come_and_go_are_what_they_are_alone(mode, delay):
    model, batch = tiny_model(delay), RunningBatch(tiny_model(delay), MODES[mode], SAMPLING)
    # A long prompt joins late, so that all others must make room for it.
    asked = [request(length, seed, max_patches=3 + 2 * seed) for seed, length in enumerate((6, 3, 9, 40, 5))]
    rules = [PAPER, LoopRules(stop_hits=2), PAPER, PAPER, LoopRules(first_test=4)]
    running, done, waiting = {}, {}, list(range(5))
    for step in range(60):
        if waiting and step % 2 == 0:
            number = waiting.pop(0)
            running[batch.join(asked[number], rules[number])] = number
        for row in batch.step() if batch.rows else []:
            done[running[row]] = row.result()
    assert sorted(done) == [0, 1, 2, 3, 4]
    for number, result in done.items():
        alone = generate(model, [asked[number]], MODES[mode], SAMPLING, rules[number])[0]
        assert alone.stopped == result.stopped
        torch.testing.assert_close(alone.speech, result.speech, atol=1e-4, rtol=0)
        if mode == "t2av":
            torch.testing.assert_close(alone.motion, result.motion, atol=1e-4, rtol=0)


def test_a_model_whose_patch_is_two_tokens_is_refused():
    with pytest.raises(UserError, match="order=va: the service takes models with order=add only"):
        RunningBatch(tiny_model(order="va"), MODES["t2av"], SAMPLING)
    assert not RunningBatch(tiny_model(order="va"), MODES["tts"], SAMPLING).rows  # of speech alone it is one


def test_a_row_that_is_given_up_changes_nothing_and_memory_does_not_grow():
    model = tiny_model()
    model.head_stop.head.weight.data.zero_()  # sigmoid(0) = 0.5 would stop at once
    model.head_stop.head.weight.data -= 1e-3
    batch, asked = RunningBatch(model, MODES["tts"], SAMPLING), request(5, 1, max_patches=6, min_patches=6)
    alone = generate(model, [asked], MODES["tts"], SAMPLING)[0]
    given_up = batch.join(request(12, 7, max_patches=30, min_patches=30), PAPER)
    row, most = batch.join(asked, PAPER), 0
    batch.step()
    batch.leave(given_up)
    while batch.rows:
        batch.step()
    torch.testing.assert_close(row.result().speech, alone.speech, atol=1e-4, rtol=0)
    for seed in range(40):  # always two rows, of which one ends every few steps
        batch.join(request(5, seed, max_patches=6, min_patches=6), PAPER)
        for _ in range(3):
            batch.step()
        most = max(most, batch._places())
    assert most <= 4 * ROOM
