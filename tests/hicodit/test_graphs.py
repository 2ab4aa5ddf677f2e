"""Sampler steps as graphs, on a stand-in whose outputs die: tokens stay, and clips share graphs."""

from dataclasses import replace

import pytest
import torch
from drawn_faces import talking_head

from engine.cuda_graph import GraphedSteps
from hicodit.conditions.types import Conditions, num_expression_windows
from hicodit.generation import capture_graphs, generate
from hicodit.model import HiCoDiT, ModelConfig
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import METHODS, GuidanceScales, SamplerConfig
from tests.gpu.dying_graphs import DyingOutputs
from tests.tiny import HICODIT

SCALES = GuidanceScales(2.5, 1.25, 1.5, 2.0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = HiCoDiT(ModelConfig(**HICODIT)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def clips(seed, *frames):
    g = torch.Generator().manual_seed(seed)
    frames = torch.tensor(frames or (20, 15))
    batch = len(frames)
    length = int(frames.max())
    lip = torch.randn(batch, length, 32, generator=g)
    identity = torch.rand(batch, 256, generator=g)
    return Conditions(lip, identity, torch.randint(0, 7, (batch, num_expression_windows(length)), generator=g), frames)


@pytest.mark.parametrize(
    ("method", "scales"),
    [*((method, SCALES) for method in METHODS), ("euler", replace(SCALES, guidance_form="literal"))],
    ids=lambda value: value if isinstance(value, str) else value.guidance_form,
)
def test_tokens_are_those_without_graphs_and_clips_share_graphs(model, method, scales):
    sampler = SamplerConfig(method, 6)
    backend = DyingOutputs()
    graphs = GraphedSteps(backend=backend)
    captures = []
    for seed in (1, 2, 3):
        expected = generate(model, clips(seed), sampler, scales, [1, 2])
        tokens = generate(model, clips(seed), sampler, scales, [1, 2], graphs=graphs)
        assert all(torch.equal(a, b) for a, b in zip(tokens, expected))
        captures.append(backend.captures)
    assert backend.replays >= 6
    # Planned steps have as many slots for revealed frames as the fullest step needs.
    assert captures[-1] <= (3 if method == "euler" and scales.guidance_form == "normalised" else 1)


def test_graphs_that_are_captured_at_the_start_serve_all_later_batches(model):
    """Thirty batches of one to four clips, of 0.2 to 3.2 s."""
    sampler = SamplerConfig("confidence", 2)
    scales = GuidanceScales(2.0)
    backend = DyingOutputs()
    graphs = GraphedSteps(backend=backend)
    capture_graphs(model, sampler, scales, graphs, 4)
    captured = backend.captures
    draw = torch.Generator().manual_seed(0)
    assert captured == 3 * 3 * 2  # one, two and four clips; one to three seconds; with and without padding
    for seed in range(30):
        size = int(torch.randint(1, 5, (), generator=draw))
        batch = clips(seed, *torch.randint(5, 81, (size,), generator=draw).tolist())
        seeds = range(seed, seed + size)
        tokens = generate(model, batch, sampler, scales, seeds, graphs=graphs)
        if seed % 10 == 0:
            expected = generate(model, batch, sampler, scales, seeds)
            assert all(torch.equal(a, b) for a, b in zip(tokens, expected, strict=True))
    assert backend.captures == captured and backend.replays


def test_a_stream_is_the_same_with_graphs(release):
    pipeline = HiCoDiTPipeline.from_pretrained(release, precision="fp32")
    head = talking_head(30)
    expected = [chunk.wave for chunk in pipeline.stream(head, 1, lookahead=0.2)]
    pipeline.graphs = GraphedSteps(backend=DyingOutputs())
    waves = [chunk.wave for chunk in pipeline.stream(head, 1, lookahead=0.2)]
    assert pipeline.graphs.backend.replays
    assert len(waves) == len(expected) and all((a == b).all() for a, b in zip(waves, expected))
