"""HiCoDiT's pipeline on a fake CUDA device: how often the host waits for it."""

from dataclasses import replace

import pytest
import torch
from drawn_faces import talking_head

from engine.cuda_graph import GraphedSteps
from hicodit.evaluate import stored_conditions
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import METHODS, GuidanceScales
from tests.gpu.fakes import CUDA, audited, faked

# The host reads the tokens of each window, with euler also how many frames each step reveals, once the expressions for
# the figure, and the audio of each batch of equal lengths.


@pytest.fixture(scope="module")
def pipeline(release):
    return HiCoDiTPipeline.from_pretrained(release, precision="fp32", compile=True)  # weights stay unpacked


def on_fake_card(pipeline):
    """Return a pipeline on the device; inside `audited`."""
    moved = HiCoDiTPipeline(faked(pipeline.system), faked(pipeline.codec), pipeline.sampler, pipeline.guidance)
    moved.device = CUDA
    moved.graphs = GraphedSteps()
    return moved


@pytest.mark.parametrize(("method", "form"), [*((method, "normalised") for method in METHODS), ("euler", "literal")])
def test_steps_of_every_sampler_do_not_synchronise(pipeline, method, form):
    """With the literal form of guidance, which positions are revealed depends on the posterior."""
    crops = [pipeline.crops(talking_head(length)) for length in (40, 30)]
    reads = []
    for steps in (3, 6):
        with audited() as audit:
            moved = on_fake_card(pipeline)
            moved.guidance = GuidanceScales(2.5, 1.25, 1.5, 2.0, form)
            moved.run(crops, range(2), sampler=replace(pipeline.sampler, method=method, steps=steps))
        assert not audit.waits
        reads.append(audit.reads)
    assert reads[0] == reads[1] and reads[0].total() <= 5, reads


def test_a_stream_reads_tokens_and_audio_of_each_hop(pipeline):
    head = talking_head(30)
    with audited() as audit:
        chunks = list(on_fake_card(pipeline).stream(head, 0, lookahead=0.2))
    # Tokens and audio of each hop, and once the voice, which stays.
    assert audit.reads.total() == 2 * len(chunks) + 1 and not audit.waits, audit.reads


def test_conditions_of_a_validation_do_not_synchronise(pipeline):
    clips = [
        {"mouth": torch.zeros(frames, 48, 48, dtype=torch.uint8), "faces": torch.zeros(4, 64, 64, 3, dtype=torch.uint8)}
        for frames in (30, 20)
    ]
    with audited() as audit:
        conditions = stored_conditions(on_fake_card(pipeline), clips)
    assert conditions.lip.device == CUDA
    assert not audit.reads and not audit.waits
