"""Talker-T2AV's pipeline on a fake CUDA device: how often the host waits for it."""

import copy
from contextlib import contextmanager
from unittest import mock

import pytest
from torch import nn

from engine.cuda_graph import GraphedStep
from service.workers import TalkerWorker, Ticket
from talker_t2av.pipeline import Job, TalkerPipeline
from tests.gpu.fakes import audited, faked
from tests.talker_t2av.talker_fixtures import face_file, save_talker, voice_file


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    root = tmp_path_factory.mktemp("talker")
    pipeline = TalkerPipeline.from_pretrained(save_talker(root, delay=1), precision="fp32", compile=True)
    pipeline.system.require("t2av")
    voice = str(voice_file(root / "voice.wav"))
    face = str(face_file(root / "face.mp4"))
    more = {"max_seconds": 3.2, "crop": "centre"}
    pipeline.jobs = {
        "tts": Job("tts", "hello", voice, **more),
        "official": Job("tts", "hello", voice, prefix_seconds=0.32, compat="official", **more),
        "t2av": Job("t2av", "hello", voice, face, **more),
        "prefix": Job("t2av", "hello", voice, face, prefix_seconds=0.32, **more),
    }
    return pipeline


@contextmanager
def on_fake_card(pipeline, patches):
    """Give an audit, and a pipeline on its device whose stop head ends all rows after some patches."""
    with audited() as audit, mock.patch("talker_t2av.generation.GraphedStep", lambda step, *_: GraphedStep(step)):
        audit.answer = patches  # to the stop tests of all rows, read every fourth patch, in a stream each patch
        system = copy.copy(pipeline.system)
        for name, value in vars(pipeline.system).items():
            if isinstance(value, nn.Module):
                setattr(system, name, faked(value))
        yield audit, TalkerPipeline(system, pipeline.sampling)


@pytest.mark.parametrize(
    ("name", "stream", "expected"),
    [
        ("tts", False, 1),
        ("official", False, 1),
        ("t2av", False, 1),
        ("prefix", False, 1),
        ("tts", True, 2 * 4),  # stop test and audio of each patch
        ("t2av", True, 3 * 4),  # and pictures
    ],
)
def test_four_more_patches_are_one_more_read_and_in_a_stream_those_of_each_patch(pipeline, name, stream, expected):
    reads = []
    for patches in (6, 10):
        with on_fake_card(pipeline, patches) as (audit, moved):
            list(moved.stream(pipeline.jobs[name])) if stream else moved(pipeline.jobs[name])
        assert not audit.waits
        reads.append(audit.reads)
    assert (reads[1] - reads[0]).total() == expected, reads


def test_the_service_reads_once_a_patch(pipeline):
    """Rows join and leave."""
    end = 6
    with on_fake_card(pipeline, end) as (audit, moved):
        jobs = [moved.prepare(pipeline.jobs["tts"]) for _ in range(3)]
        audit.reads.clear()
        worker = TalkerWorker(moved, 4)
        heard = []
        one, two, three = (Ticket(job, on_patch=heard.append) for job in jobs)
        worker.join_batch(one)
        (batch,) = worker.batches.values()
        for step in range(end + 4):
            if step == 1:
                worker.join_batch(two)
            if step == 3:
                two.cancel()
            if step == 4:
                worker.join_batch(three)
            worker.step(batch)
    assert one.done() and three.done() and not worker.rows and len(heard) == end + 2 + end
    assert audit.reads.total() == end + 4 and not audit.waits, audit.reads
