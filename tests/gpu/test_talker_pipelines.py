"""Whole pipelines of Talker-T2AV on a CUDA device that is not there: how often the host waits for it.

One more read of a tensor's value, or a copy from memory that is not pinned, fails.
"""

import copy
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from torch import nn

from engine.cuda_graph import GraphedStep
from engine.evaluation.clips import Clip
from engine.metrics.metric import Take
from service.workers import TalkerWorker, Ticket
from talker_t2av.evaluate import write_outputs
from talker_t2av.pipeline import Job, TalkerPipeline
from tests.gpu.fakes import audited, faked
from tests.talker_t2av.talker_fixtures import face_file, save_talker, voice_file

STOP = "talker_t2av/generation.py:step"  # reads the stop tests of all rows: every fourth patch, in a stream each patch
END = 6  # patches after which the stop head ends all rows


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    root = tmp_path_factory.mktemp("talker")
    pipeline = TalkerPipeline.from_pretrained(save_talker(root, delay=1), precision="fp32", compile=True)
    pipeline.system.require("t2av")
    voice = str(voice_file(root / "voice.wav"))
    face = str(face_file(root / "face.mp4"))
    pipeline.save_voice(voice, root / "saved.safetensors")
    more = {"max_seconds": 1.28, "crop": "centre"}
    pipeline.jobs = {
        "tts": Job("tts", "hello", voice, **more),
        "saved": Job("tts", "hello", str(root / "saved.safetensors"), **more),
        "official": Job("tts", "hello", voice, prefix_seconds=0.32, compat="official", **more),
        "parts": Job("t2av", "hello. good day. well", voice, face, **more),
        "t2av": Job("t2av", "hello", voice, face, **more),
        "prefix": Job("t2av", "hello", voice, face, prefix_seconds=0.32, **more),
        "a2v": Job("a2v", "", reference_video=face, audio=voice, **more),
        "v2a": Job("v2a", "hello", voice, video=face, **more),
    }
    return pipeline


@contextmanager
def on_fake_card(pipeline, **sampling):
    """Give an audit, and a pipeline whose networks lie on its device."""
    with audited() as audit, mock.patch("talker_t2av.generation.GraphedStep", lambda step, *_: GraphedStep(step)):
        audit.answers[STOP] = END
        system = copy.copy(pipeline.system)
        for name, value in vars(pipeline.system).items():
            if isinstance(value, nn.Module):
                setattr(system, name, faked(value))
        yield audit, TalkerPipeline(system, replace(pipeline.sampling, **sampling))


@pytest.mark.parametrize(
    ("names", "sampling", "expected"),
    [
        (["tts"], {}, 5),
        (["official"], {}, 6),
        (["t2av", "t2av"], {}, 14),
        (["parts"], {"text_bytes": 10}, 9),
        (["prefix"], {}, 9),
        (["v2a", "v2a"], {"particles": 4}, 10),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_talker_reads_stop_tests_and_results_alone(pipeline, names, sampling, expected):
    with on_fake_card(pipeline, **sampling) as (audit, moved):
        moved.run([pipeline.jobs[name] for name in names])
    assert audit.reads.total() == expected and not audit.waits, audit.reads


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tts", 12),
        ("t2av", 15),
        ("v2a", 5),
    ],
)
def test_talker_streams_read_stop_test_sound_and_pictures_of_each_hop(pipeline, name, expected):
    """Audio of the first patches comes together, once the decoder has the frames after it."""
    with on_fake_card(pipeline) as (audit, moved):
        list(moved.stream(pipeline.jobs[name]))
    assert audit.reads.total() == expected and not audit.waits, audit.reads


def test_the_service_reads_once_a_patch(pipeline):
    """Rows join and leave."""
    with on_fake_card(pipeline) as (audit, moved):
        jobs = [moved.prepare(pipeline.jobs[name]) for name in ("tts", "saved", "tts")]
        audit.reads.clear()
        worker = TalkerWorker(moved, 4)
        heard = []
        one, two, three = (Ticket(job, on_patch=heard.append) for job in jobs)
        worker.join_batch(one)
        (batch,) = worker.batches.values()
        for step in range(END + 4):
            if step == 1:
                worker.join_batch(two)
            if step == 3:
                two.cancel()
            if step == 4:
                worker.join_batch(three)
            worker.step(batch)
    assert one.done() and three.done() and not worker.rows and len(heard) == END + 2 + END
    assert audit.reads == {STOP: END + 4} and not audit.waits


@pytest.mark.parametrize(("mode", "expected"), [("resynthesis", 4), ("v2a", 8)])
def test_an_evaluation_reads_what_its_clips_do(pipeline, tmp_path, mode, expected):
    voice = pipeline.jobs["tts"].reference_audio
    face = pipeline.jobs["v2a"].video
    true = Take(audio=Path(voice), video=Path(face), source=Path(face), text="hello")
    clips = [Clip(name, None, true, {}, true) for name in "ab"]
    with on_fake_card(pipeline) as (audit, moved), mock.patch.object(TalkerPipeline, "from_pretrained") as load:
        load.return_value = moved
        write_outputs(clips, tmp_path, "cuda", mode=mode)
    assert len([*tmp_path.glob("*.wav")]) == 2
    assert audit.reads.total() == expected and not audit.waits, audit.reads
