"""Rows that share a decoder come and go; graphs serve one utterance after another; outputs that die change nothing.

Axes: B rows, S steps.
"""

from dataclasses import replace

import pytest
import torch
from talker_fixtures import assert_close, generate, request, tiny_model

from talker_t2av.generation import BUCKET, BatchedDecoder, tensors_of
from talker_t2av.request import MODES, Sampling, StoppingRules
from tests.gpu.dying_graphs import DyingOutputs

SAMPLING = Sampling(steps=3, temperature=0.8, guidance=1.5)


def come_and_go(decoder, asked):
    """Let a request join every second step; return the results in the order of the requests."""
    joined = []
    waiting = [*asked]
    for step in range(60):
        if waiting and step % 2 == 0:
            joined.append(decoder.join(waiting.pop(0)))
        if decoder.active:
            decoder.step()
    return [decoder.result(row) for row in joined]


@pytest.mark.parametrize(
    ("mode", "delay", "order", "given"),
    [
        ("t2av", 2, "add", {}),
        ("tts", 0, "add", {}),
        ("t2av", 0, "va", {}),
        ("a2v", 0, "av", {"speech": 20}),
        ("v2a", 0, "add", {"motion": 20}),
    ],
)
def test_rows_that_join_and_finish_equal_single_rows(mode, delay, order, given):
    """Steps are graphs, whose outputs the next replay destroys; one of three rows computes a fourth that no request
    has."""
    model = tiny_model(delay, context=2, order=order)
    decoder = BatchedDecoder(model, MODES[mode], SAMPLING, 5, backend=DyingOutputs())
    # The cache grows for the long prompt, which joins late.
    rules = [StoppingRules(), StoppingRules(stop_hits=2), StoppingRules(), StoppingRules(), StoppingRules(first_test=4)]
    asked = [
        request(length, seed, max_patches=3 + 2 * seed, rules=own, **given)
        for seed, (length, own) in enumerate(zip((6, 3, 9, 80, 5), rules))
    ]
    for one, result in zip(asked, come_and_go(decoder, asked)):
        assert_close(generate(model, [one], MODES[mode], SAMPLING)[0], result, 1e-4)


def test_active_rows_continue_if_there_is_no_memory_for_another(monkeypatch):
    model = tiny_model()
    asked = request(5, 1, max_patches=6, min_patches=6)
    alone = generate(model, [asked], MODES["tts"], SAMPLING)[0]
    decoder = BatchedDecoder(model, MODES["tts"], SAMPLING, 2)
    row = decoder.join(asked)
    length = decoder.length
    zeros = torch.zeros

    def without_memory(*shape, **how):
        if len(shape) == 6:  # the cache
            raise torch.OutOfMemoryError
        return zeros(*shape, **how)

    decoder.step()
    monkeypatch.setattr("torch.zeros", without_memory)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.join(request(3 * BUCKET, 2, max_patches=6))
    monkeypatch.undo()
    assert decoder.length == length
    while decoder.active:
        decoder.step()
    assert_close(alone, decoder.result(row), 1e-4)


def test_a_cancelled_row_changes_nothing_and_memory_does_not_grow():
    model = tiny_model()
    model.head_stop.head.weight.data.zero_()  # sigmoid(0) = 0.5 would stop at once
    model.head_stop.head.weight.data -= 1e-3
    decoder = BatchedDecoder(model, MODES["tts"], SAMPLING, 3)
    asked = request(5, 1, max_patches=6, min_patches=6)
    alone = generate(model, [asked], MODES["tts"], SAMPLING)[0]
    given_up = decoder.join(request(12, 7, max_patches=30, min_patches=30))
    row = decoder.join(asked)
    decoder.step()
    decoder.leave(given_up)
    while decoder.active:
        decoder.step()
    assert_close(decoder.result(row), alone, 1e-4)
    cache = decoder.cache
    for seed in range(20):  # always two rows, of which one ends every few steps
        decoder.join(request(5, seed, max_patches=6, min_patches=6))
        for _ in range(3):
            decoder.step()
    assert decoder.cache is cache and decoder.length == BUCKET


def test_a_stream_reads_the_outputs_of_a_graph_before_the_next_replay():
    model = tiny_model(delay=1)
    asked = request(max_patches=5, min_patches=5)
    ways = [
        list(BatchedDecoder(model, MODES["t2av"], SAMPLING, backend=backend).stream(asked))
        for backend in (None, DyingOutputs())
    ]
    assert len(ways[0]) == len(ways[1]) == 6
    for a, b in zip(*ways):
        assert all(torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))


def test_a_step_compiles_to_a_full_graph():
    """Without a compiler behind it: what is tested is that a step can be traced whole, and twice at most."""
    model = tiny_model()
    asked = [request(max_patches=5, min_patches=5, seed=s) for s in (1, 2)]
    graphs = []
    torch._dynamo.reset()
    decoder = BatchedDecoder(model, MODES["t2av"], SAMPLING, 2)
    decoder.run_step.step = torch.compile(
        decoder._step, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph
    )
    for a, b in zip(generate(model, asked, MODES["t2av"], SAMPLING), decoder.generate(asked)):
        assert_close(a, b, 1e-5)
    assert 1 <= len(graphs) <= 2


@pytest.mark.parametrize(("mode", "delay"), [("tts", 0), ("t2av", 0), ("t2av", 2)])
def test_a_patch_that_ends_in_padding_ends_the_row(monkeypatch, mode, delay):
    """In training, only the last patch of a clip is padded."""
    model = tiny_model(delay)
    monkeypatch.setattr(model.head_stop, "forward", lambda hidden: torch.full((len(hidden),), -9.0))
    sample = model.speech_cfm.sample
    calls = []

    def third_is_padded(*arguments, **more):
        patch = sample(*arguments, **more) + 1.0
        calls.append(0)
        patch[..., -1] *= len(calls) != 3
        return patch

    monkeypatch.setattr(model.speech_cfm, "sample", third_is_padded)
    size = model.config.patch_size
    asked = request(5, 1, max_patches=8)
    (result,) = generate(model, [asked], MODES[mode], SAMPLING)
    assert len(result.speech) == 3 * size and result.stopped
    assert result.motion is None or len(result.motion) == 3 * size
    for other in (replace(asked, rules=StoppingRules(padding_ends=False)), replace(asked, min_patches=4)):
        calls.clear()
        (result,) = generate(model, [other], MODES[mode], SAMPLING)
        assert len(result.speech) == 8 * size and not result.stopped
