"""The decoder does what training does, in all modes; where it ends, also as the official program does."""

from dataclasses import replace

import pytest
import torch
from talker_fixtures import all_frames, generate, request, tiny_model, utterance

from engine.errors import UserError
from talker_t2av import official
from talker_t2av.data import SequenceFormat
from talker_t2av.diffusion_head import FlowHead
from talker_t2av.generation import BatchedDecoder
from talker_t2av.losses import training_forward
from talker_t2av.request import MODES, Sampling
from talker_t2av.system import MotionStats

SAMPLING = Sampling(steps=3, temperature=0.8, guidance=1.5)


def drawn_states(model, asked, mode, monkeypatch):
    """The result without stop tests, and for speech and motion the states (n, D) from which patches were drawn."""
    seen = {id(model.speech_cfm): [], id(model.motion_cfm): []}
    sample = FlowHead.sample

    def record(head, mu, *more, **settings):
        seen[id(head)].append(mu.clone())
        return sample(head, mu, *more, **settings)

    monkeypatch.setattr(FlowHead, "sample", record)
    result = generate(model, [asked], MODES[mode], SAMPLING, use_stop=False)[0]
    return result, [torch.cat(states) if states else None for states in seen.values()]


KINDS = [({}, 0), ({}, 3), ({"delay": 2}, 3), ({"order": "av"}, 0), ({"order": "va"}, 3)]  # with frames of a prefix


@pytest.mark.parametrize(("kind", "prefix"), KINDS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_patches_are_sampled_from_the_hidden_states_of_the_training_forward(mode, kind, prefix, monkeypatch):
    """What the heads see equals the training forward on the finished utterance."""
    model = tiny_model(**kind)
    size = 4
    total = prefix + 6
    frames = {
        "t2av": (size * prefix, size * prefix),
        "tts": (size * prefix, 0),
        "a2v": (size * total - 1, size * prefix),
        "v2a": (size * prefix, size * total),
    }[mode]
    asked = request(speech=frames[0], motion=frames[1], prefix=prefix, max_patches=total - prefix)
    result, states = drawn_states(model, asked, mode, monkeypatch)
    speech, motion = all_frames(asked, result)
    assert -(-len(speech) // size) == total and len(motion) == (0 if mode == "tts" else size * total)
    delay = kind.get("delay", 0)
    format = SequenceFormat(7, [], size, delay, order=kind.get("order", "add"))
    with torch.no_grad():
        batch = utterance(asked, speech, motion, format.slots(len(speech), len(motion)))
        forward = training_forward(model, batch)
    assert [drawn is None for drawn in states] == [mode == "a2v", mode in ("tts", "v2a")]
    for drawn, examples, lag in zip(states, (forward.speech, forward.motion), (0, delay)):
        if drawn is not None:
            expected = examples.mu[:: model.config.repeats][prefix:]
            assert len(expected) == total - prefix
            same = total - prefix - lag * (mode == "t2av")  # later states have seen speech that is trimmed
            torch.testing.assert_close(drawn[:same], expected[:same], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "mode", "known"),
    [
        ({}, "a2v", False),
        ({"order": "av"}, "a2v", True),
        ({"order": "va"}, "a2v", False),
        ({"order": "va"}, "v2a", True),
    ],
    ids=str,
)
def test_interleaved_models_condition_a_patch_on_the_given_patch_of_the_same_time(kind, mode, known):
    model = tiny_model(**kind)
    size = 4
    given, drawn = ("speech", "motion") if mode == "a2v" else ("motion", "speech")
    asked = request(**{given: 6 * size})
    changed = getattr(asked, given).clone()
    changed[3 * size :] += 1
    one, two = (
        getattr(generate(model, [row], MODES[mode], SAMPLING)[0], drawn).unflatten(0, (-1, size))
        for row in (asked, replace(asked, **{given: changed}))
    )
    same = [torch.equal(a, b) for a, b in zip(one, two)]
    assert same.index(False) == (3 if known else 4)


class Verdicts(torch.nn.Module):
    """A stop head with a script: one probability per step, of the end after it."""

    def __init__(self, hits: str) -> None:
        super().__init__()
        self.hits = iter(hits)

    def forward(self, hidden):
        return torch.full((len(hidden),), 9.0 if next(self.hits) == "x" else -9.0)


@pytest.mark.parametrize("delay", [0, 2])
def test_the_first_stop_prediction_ends_a_request_and_delayed_motion_is_trimmed(delay):
    model = tiny_model(delay)
    model.head_stop = Verdicts("x" * (1 + delay) + "...x")
    result = generate(model, [request(min_patches=2, max_patches=30)], MODES["t2av"], SAMPLING)[0]
    # tests count from slot 2 + delay on, and the fourth one hits: 5 + delay slots, the last `delay` for motion alone
    assert result.stopped and len(result.speech) == len(result.motion) == 4 * 5


@pytest.mark.parametrize("check_every", [1, 2, 4, 9])
def test_a_stop_between_two_checks_counts_at_the_limit_and_at_once_in_a_stream(check_every):
    model = tiny_model()
    model.head_stop = Verdicts("....x..")
    rows = [request(max_patches=7), request(max_patches=3)]
    one, other = generate(model, rows, MODES["tts"], SAMPLING, check_every=check_every)
    assert one.stopped and len(one.speech) == 4 * 5
    assert not other.stopped and len(other.speech) == 4 * 3
    model.head_stop = Verdicts("....x..")
    assert len(list(BatchedDecoder(model, MODES["tts"], SAMPLING, check_every=check_every).stream(rows[0]))) == 5


def test_an_utterance_ends_at_its_limit_and_seeds_differ():
    model = tiny_model()
    model.head_stop = Verdicts("." * 99)
    first = request(max_patches=5)
    one, other = generate(model, [first, replace(first, seed=5)], MODES["tts"], SAMPLING)
    assert not one.stopped and len(one.speech) == 20 and one.motion is None
    assert not torch.allclose(one.speech, other.speech, atol=1e-2)
    with pytest.raises(UserError, match="shorter"):
        generate(model, [request(length=510, max_patches=5)], MODES["tts"], SAMPLING)


def test_half_precision_is_close_and_repeats_itself():
    model = tiny_model()
    rows = [request(max_patches=3, seed=s) for s in (1, 2)]
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


# frames of a patch, channels
SIZE = 4
SPEECH = 32
MOTION = 40


@pytest.mark.parametrize(("prefix", "reference", "limit"), [(0, 41, 11 + 25), (9, 41, 11 - 3 + 25), (8, 8, 0 + 25)])
def test_speech_may_be_25_patches_longer_than_its_reference(prefix, reference, limit):
    request = official.library_method(
        tiny_model().config, [1, 2], torch.zeros(256), torch.zeros(prefix, SPEECH), reference
    )
    assert (request.prefix, request.max_patches) == (-(-prefix // SIZE), limit)
    assert request.rules.first_test == 25 // SIZE


def test_speech_and_motion_may_exceed_their_reference_by_15_patches_less_the_delay():
    config = tiny_model(delay=2).config
    request = official.library_method(config, [1], torch.zeros(256), torch.zeros(8, SPEECH), 41, torch.zeros(MOTION))
    assert (request.prefix, request.max_patches) == (2, 11 - 2 + 15 - 2)
    stats = MotionStats(torch.zeros(MOTION), torch.ones(MOTION))
    request = official.inference_script(
        config, stats, [1], torch.zeros(256), torch.zeros(40, SPEECH), torch.zeros(44, MOTION), prefix_seconds=0.5
    )
    assert (request.prefix, len(request.motion), request.max_patches) == (3 + 2, 12, 13 - 5 + 15 - 2)
