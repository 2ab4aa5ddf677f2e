"""Interleaved tokens, A-V and V-A: training and generation agree, and the second stream knows the first one's patch."""

from __future__ import annotations

import pytest
import torch
from talker_fixtures import all_frames, generate, request, tiny_model, utterance

from engine.errors import UserError
from talker_t2av.data import SequenceFormat
from talker_t2av.diffusion_head import FlowHead
from talker_t2av.losses import stop_labels, training_forward
from talker_t2av.model import TalkerConfig
from talker_t2av.request import MODES, Sampling

SAMPLING = Sampling(steps=2, temperature=0.8, guidance=1.0)
SIZE, PATCHES = 4, 5


def generated(model, asked, mode, monkeypatch):
    """The result, and by head the hidden states (n, D) from which its patches were drawn."""
    seen = {id(model.speech_cfm): [], id(model.motion_cfm): []}
    sample = FlowHead.sample

    def record(self, mu, *more, **settings):
        seen[id(self)].append(mu.clone())
        return sample(self, mu, *more, **settings)

    monkeypatch.setattr(FlowHead, "sample", record)
    result = generate(model, [asked], MODES[mode], SAMPLING, use_stop=False)[0]
    return result, [torch.cat(states) if states else None for states in seen.values()]


@pytest.mark.parametrize("order", ["av", "va"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefix", [0, 2])
def test_patches_are_drawn_from_the_states_of_training(order, mode, prefix, monkeypatch):
    model, total = tiny_model(order=order), prefix + PATCHES
    given = {"t2av": (prefix, prefix), "tts": (prefix, 0), "a2v": (total, prefix), "v2a": (prefix, total)}[mode]
    asked = request(speech=SIZE * given[0], motion=SIZE * given[1], prefix=prefix, max_patches=PATCHES)
    result, states = generated(model, asked, mode, monkeypatch)
    speech, motion = all_frames(asked, result)
    assert len(speech) == SIZE * total and len(motion) == (0 if mode == "tts" else SIZE * total)
    with torch.no_grad():
        slots = SequenceFormat(7, [], order=order).slots(len(speech), len(motion))
        forward = training_forward(model, utterance(asked, speech, motion, slots))
    for drawn, examples in zip(states, (forward.speech, forward.motion)):
        if drawn is not None:
            expected = examples.mu[:: model.config.repeats][prefix:]
            torch.testing.assert_close(drawn, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("order", "mode", "known"), [("av", "a2v", True), ("va", "a2v", False), ("va", "v2a", True)])
def test_the_second_stream_is_drawn_with_the_first_ones_patch_of_its_time_known(order, mode, known):
    model = tiny_model(order=order)
    given, drawn = ("speech", "motion") if mode == "a2v" else ("motion", "speech")
    results = []
    for changed in (False, True):
        asked = request(speech=SIZE * 3 * (mode == "a2v"), motion=SIZE * 3 * (mode == "v2a"))
        if changed:
            getattr(asked, given)[SIZE:] += 1  # from the second patch on
        results.append(getattr(generate(model, [asked], MODES[mode], SAMPLING)[0], drawn))
    one, two = results
    assert torch.equal(one[:SIZE], two[:SIZE])
    assert torch.equal(one[SIZE : 2 * SIZE], two[SIZE : 2 * SIZE]) != known
    assert not torch.equal(one[2 * SIZE :], two[2 * SIZE :])


def test_sequences_have_two_slots_a_patch_where_there_is_motion():
    plain, turns = SequenceFormat(7, []), SequenceFormat(7, [], order="va")
    assert (plain.slots(17, 16), turns.slots(17, 16)) == (5, 10)
    assert plain.slots(17, 0) == turns.slots(17, 0) == 5


def test_the_end_is_asked_for_after_the_last_token_of_a_patch():
    start, length, step = torch.tensor([2, 1]), torch.tensor([12, 6]), torch.tensor([2, 1])
    labels, weight = stop_labels(start, length, 15, SIZE, step=step)
    ignored = -100
    assert labels[0].tolist() == [ignored] * 3 + [0, ignored, 0, ignored, 0] + [ignored] * 5 + [1, ignored]
    assert labels[1].tolist() == [ignored, 0, 0, 0, ignored, ignored, 1] + [ignored] * 8
    assert weight == 3  # zeros before each end, on average


def test_settings_that_do_not_go_together_are_refused():
    for changes, message in (
        ({"order": "xy"}, "unknown; choose add, av, va"),
        ({"order": "av", "delay": 1}, "delay=0"),
    ):
        with pytest.raises(UserError, match=message):
            TalkerConfig(llm={}, **changes)
    with pytest.raises(UserError, match="official routines do not know"):
        generate(tiny_model(order="av"), [request(task_first=False)], MODES["t2av"], SAMPLING)
