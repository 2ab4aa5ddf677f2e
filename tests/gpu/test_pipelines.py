"""Whole pipelines on a CUDA device that is not there: every host read stands in a list, with its reason.

A read or a waiting copy that is not in the list fails, and so does one that is made more often.
"""

from collections import Counter

import numpy as np
import pytest
from drawn_faces import talking_head

from engine.cuda_graph import GraphedSteps
from hicodit.pipeline import HiCoDiTPipeline
from tests.gpu.fakes import CUDA, audited, faked
from tests.hicodit.conftest import release  # noqa: F401  (a fixture)

TOKENS = "hicodit/generation.py:generate"  # the tokens of a window
SCHEDULE = "hicodit/samplers.py:revealed_frames"  # how many frames each step reveals: shapes of the steps
WAVE = "hicodit/pipeline.py:decode_tokens"  # sound, once for each batch of equal lengths
EXPRESSION = "hicodit/pipeline.py:run"  # expressions for the figure


@pytest.fixture(scope="module")
def pipeline(release):  # noqa: F811
    return HiCoDiTPipeline.from_pretrained(release, precision="fp32", compile=True)  # weights stay unpacked


def on_fake_card(pipeline):
    """Inside `audited`."""
    moved = HiCoDiTPipeline(faked(pipeline.system), faked(pipeline.codec), pipeline.sampler, pipeline.guidance)
    moved.device, moved.graphs = CUDA, GraphedSteps()
    return moved


@pytest.mark.parametrize(
    ("lengths", "voice", "expected"),
    [
        ([40], False, {TOKENS: 1, SCHEDULE: 1, WAVE: 1, EXPRESSION: 1}),
        ([40, 40], False, {TOKENS: 1, SCHEDULE: 1, WAVE: 1, EXPRESSION: 1}),
        ([40, 20], True, {TOKENS: 1, SCHEDULE: 1, WAVE: 2, EXPRESSION: 1}),
        ([200], False, {TOKENS: 4, SCHEDULE: 4, WAVE: 1, EXPRESSION: 1}),  # four windows
    ],
    ids=["clip", "batch", "voice", "long"],
)
def test_hicodit_reads_tokens_and_sound_alone(pipeline, lengths, voice, expected):
    crops = [pipeline.crops(talking_head(length)) for length in lengths]
    identity = np.ones(256, np.float32) / 16 if voice else None
    with audited() as audit:
        on_fake_card(pipeline).run(crops, range(len(crops)), identity)
    assert audit.reads == Counter(expected) and not audit.waits


def test_hicodit_streams_read_tokens_and_sound_of_each_hop(pipeline):
    head = talking_head(30)
    with audited() as audit:
        chunks = list(on_fake_card(pipeline).stream(head, 0, lookahead=0.2))
    hops = len(chunks)  # and once the voice, which stays
    assert audit.reads == Counter({"hicodit/streaming.py:_sample": hops + 1, "hicodit/streaming.py:push": hops})
    assert not audit.waits
