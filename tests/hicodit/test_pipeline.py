"""From clip to speech with a random tiny release: shapes, seeds, windows, batches."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from drawn_faces import talking_head

from engine.cuda_graph import GraphedSteps
from engine.errors import UserError
from engine.precision import Int8Linear, can_int8
from hicodit import pipeline as pipeline_module
from hicodit import system as system_module
from hicodit.generation import OVERLAP_FRAMES, RESAMPLED_FRAMES, generate, sampling_windows
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import GuidanceScales, SamplerConfig
from tests.gpu.dying_graphs import DyingOutputs

WINDOW = 75  # video frames


vnni = pytest.param("int8", marks=pytest.mark.skipif(not can_int8("cpu"), reason="needs an x86 processor with VNNI"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", vnni])
def test_equal_seeds_give_equal_speech_at_each_precision(release, clip, precision):
    first, again = (HiCoDiTPipeline.from_pretrained(release, precision=precision) for _ in range(2))
    half = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}[precision]
    blocks = {type(block.qkv) for stage in first.system.model.stages for block in stage.blocks}
    assert (blocks == {Int8Linear}) == (precision == "int8")
    assert {stage.heads[0].weight.dtype for stage in first.system.model.stages} == {first.system.model.dtype} == {half}
    crops = [first.crops(clip)]
    one, other = first.run(crops, [3])[0], again.run(crops, [3])[0]
    assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.wave, other.wave)
    assert not np.array_equal(one.tokens, first.run(crops, [4])[0].tokens)


@pytest.mark.parametrize(("method", "precision"), [("euler", "fp32"), ("confidence", "bf16")])
def test_a_sampling_step_compiles_to_a_full_graph(release, clip, method, precision):
    """Without a compiler behind it: what is tested is that a step can be captured whole, and in a few graphs."""
    pipeline = HiCoDiTPipeline.from_pretrained(release, precision=precision)
    crops = pipeline.crops(clip)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    sampler = replace(pipeline.sampler, method=method, steps=3)
    plain = pipeline.run([crops], [0], sampler=sampler)[0]
    torch._dynamo.reset()
    compile = torch.compile
    with mock.patch("torch.compile", lambda step, fullgraph: compile(step, fullgraph=fullgraph, backend=count)):
        pipeline.graphs = GraphedSteps(compile=True)
        captured = pipeline.run([crops], [0], sampler=sampler)[0]
        assert np.array_equal(plain.tokens, captured.tokens)
        pipeline.run([crops], [1], sampler=sampler)
    assert 1 <= len(graphs) <= 4


def test_later_windows_keep_the_tokens_of_earlier_ones(pipeline):
    """A long clip begins as its first window does alone: later windows start from kept tokens."""
    frames = WINDOW + 60
    crops = pipeline.crops(talking_head(frames))
    conditions = pipeline.conditions([crops])
    whole = generate(pipeline.system.model, conditions, pipeline.sampler, pipeline.guidance, [0])[0]
    assert whole.shape == (12, 2 * frames) and whole.max() < 16
    first = replace(
        conditions, lip=conditions.lip[:, :WINDOW], expression=conditions.expression[:, : 2 * WINDOW // 25],
        frames=torch.tensor([WINDOW]),
    )  # fmt: skip
    alone = generate(pipeline.system.model, first, pipeline.sampler, pipeline.guidance, [0])[0]
    kept = 2 * (WINDOW - RESAMPLED_FRAMES)
    assert torch.equal(whole[:, :kept], alone[:, :kept])
    assert not torch.equal(whole[:, kept : kept + 2], alone[:, kept : kept + 2])  # from here on they are drawn again
    assert sampling_windows(WINDOW, pipeline.sampler) == [(0, WINDOW)]
    assert sampling_windows(WINDOW + 1, pipeline.sampler) == [(0, WINDOW), (WINDOW - OVERLAP_FRAMES, WINDOW + 1)]
    assert len(sampling_windows(2 * WINDOW, pipeline.sampler)) == 3


@pytest.mark.parametrize(
    ("method", "form"), [("euler", "normalised"), ("euler", "literal"), ("confidence", "normalised")]
)
def test_evaluations_are_those_of_the_network_also_when_graphs_are_replayed(release, method, form):
    pipeline = HiCoDiTPipeline.from_pretrained(release, precision="fp32")
    pipeline.sampler = SamplerConfig(method, 4, window=2)
    pipeline.guidance = GuidanceScales(2.5, 1.25, 0.0, 2.0, form)
    branches = len(pipeline.guidance.branches)
    calls = []
    hook = pipeline.system.model.register_forward_hook(lambda model, given, out: calls.append(1))
    long, short = pipeline.crops(talking_head(60)), pipeline.crops(talking_head(40))  # two windows, and one
    (alone,) = pipeline.run([long], [0])
    assert alone.evaluations == len(calls) * branches
    hook.remove()
    pipeline.graphs = GraphedSteps(backend=DyingOutputs())
    replayed, other = pipeline.run([long, short], [0, 1])
    assert replayed.evaluations == alone.evaluations
    assert other.evaluations in (4 * branches, 5 * branches)  # euler has a last step where one is needed


def test_expressions_that_change_within_a_clip_reach_the_temporal_scales(pipeline, monkeypatch):
    """A face that changes in the third half second; the clip is done in two windows, the second from frame 50 on."""

    def shown(faces):
        return torch.nn.functional.one_hot(torch.where(torch.arange(len(faces)) < 25, 1, 4), 7).float()

    monkeypatch.setattr(pipeline.system.encoders.expression, "forward", shown)
    crops = pipeline.crops(talking_head(80))
    scales = []
    hook = pipeline.system.model.stages[1].blocks[0].register_forward_hook(lambda m, x, y: scales.append(x[4][0]))
    pipeline.run([crops], [0], sampler=replace(pipeline.sampler, steps=1))
    hook.remove()
    first, second = scales[0], scales[-1]
    assert first.shape == (150, 2) and second.shape == (60, 2)
    assert torch.equal(first[0], first[49]) and (first[49] != first[50]).all() and torch.equal(first[50], first[149])
    assert torch.equal(second[0], second[-1])


def test_memory_does_not_grow_with_the_clip(pipeline, monkeypatch, spy):
    """Of a longer clip no stage sees more at once, and no more face crops are kept."""
    monkeypatch.setattr(pipeline_module, "DECODE_FRAMES", 100)
    monkeypatch.setattr(system_module, "FACE_BATCH", 64)
    encoders = pipeline.system.encoders
    stages = [  # what sees a part of the clip at once, and the axis of time
        (spy(encoders.lip, "_encode"), 1),
        (spy(encoders.expression, "forward"), 0),
        (spy(pipeline.codec, "decode"), 2),
    ]
    largest = []
    for copies in (5, 8):
        crops = pipeline.crops(np.concatenate([talking_head(40)] * copies), face_box=[20, 20, 90, 90])
        (speech,) = pipeline.run([crops], [0], sampler=replace(pipeline.sampler, steps=1))
        assert len(crops) == 40 * copies and len(crops.voice_faces) == 4
        assert len(speech.wave) == 40 * copies * 960
        largest.append([max(call.args[0].shape[axis] for call in stage.call_args_list) for stage, axis in stages])
    assert largest[0] == largest[1] and max(largest[0]) < 120


def test_crops_do_not_depend_on_the_blocks_of_frames(pipeline):
    head = talking_head(40)
    whole = pipeline.crops(head)
    parts = pipeline.crop_track([head[:7], head[7:20], head[20:]], whole.track)
    assert np.array_equal(parts.mouth, whole.mouth) and np.array_equal(parts.voice_faces, whole.voice_faces)
    assert torch.equal(parts.expression, whole.expression)


def test_a_long_clip_sounds_as_it_does_decoded_at_once(pipeline, clip, monkeypatch):
    crops = pipeline.crops(clip)
    whole = pipeline.run([crops] * 2, [0, 1])
    monkeypatch.setattr(pipeline_module, "DECODE_FRAMES", 20)
    for before, after in zip(whole, pipeline.run([crops] * 2, [0, 1])):
        assert np.array_equal(before.tokens, after.tokens)
        np.testing.assert_allclose(before.wave, after.wave, atol=1e-5)


@pytest.mark.parametrize(
    ("frames", "message"), [(np.zeros((30, 64, 64, 3), np.uint8), "no face"), ([np.zeros((64, 64, 3))], "uint8")]
)
def test_a_stream_of_bad_frames_is_refused(pipeline, frames, message):
    with pytest.raises(UserError, match=message):
        list(pipeline.stream(frames))


def test_a_list_of_clips_is_a_batch_with_a_seed_each(pipeline, clip):
    frames = talking_head(20)
    one, other = pipeline([clip, frames], seed=np.array([3, 4]), steps=2)
    assert np.array_equal(one.tokens, pipeline(clip, seed=3, steps=2).tokens)
    assert np.array_equal(other.tokens, pipeline(frames, seed=np.int64(4), steps=np.int64(2)).tokens)
    with pytest.raises(UserError, match="3 seeds for 2 clips"):
        pipeline([clip, frames], seed=[1, 2, 3])
    with pytest.raises(UserError, match="expected a GE2E embedding"):
        next(pipeline.stream(frames, identity=np.zeros(128, np.float32)))


def test_frames_may_be_tensors_and_of_another_rate(pipeline):
    frames = talking_head(20)
    expected = pipeline(frames, steps=2).tokens
    tensor = torch.from_numpy(frames)
    for given in (tensor, tensor.movedim(-1, 1)):
        assert np.array_equal(pipeline(given, steps=2).tokens, expected)
    assert np.array_equal(pipeline(frames.repeat(2, 0), fps=50, steps=2).tokens, expected)
    assert pipeline(frames, fps=12.5, steps=2).tokens.shape[1] == 80  # 1.6 s
