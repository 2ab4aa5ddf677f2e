"""Whole pipelines of Talker-T2AV on a CUDA device that is not there: every host read stands in a list.

A read or a waiting copy that is not in the list fails, and so does one that is made more often; see `test_pipelines`.
"""

import copy
from collections import Counter
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

STOP = "talker_t2av/generation.py:step"  # the stop tests of all rows, every fourth patch; in a stream, each patch
VOICE = "talker_t2av/jobs.py:speaker"  # the embedding: requests wait on the host for their batch
GIVEN = "talker_t2av/jobs.py:encode_speech"  # latents of a given sound, or of a prefix
EARLY = "talker_t2av/jobs.py:official_request"  # latents of a prefix, as the official routines encode it
MOTION = "talker_t2av/jobs.py:encode_motion"  # motion of the face, or of a given clip
WAVE = "talker_t2av/pipeline.py:complete"  # sound, latents and motion, each once
HOP = "talker_t2av/pipeline.py:_waves"  # sound of a hop
PICTURES = "engine/media/pictures.py:to_bytes"  # of 64 frames, or of a hop
DRAFTS = "talker_t2av/particles.py:leave"  # which drafts went on, and which one is the best
DECODED = "engine/evaluation/resynthesis.py:decode_wave"  # sound of a clip
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
        (["tts"], {}, {VOICE: 1, STOP: 2, WAVE: 2}),
        (["saved"], {}, {STOP: 2, WAVE: 2}),
        (["official"], {}, {VOICE: 1, EARLY: 1, STOP: 2, WAVE: 2}),
        (["t2av", "t2av"], {}, {VOICE: 2, MOTION: 2, STOP: 2, WAVE: 6, PICTURES: 2}),
        (["t2av"], {"guidance": 1.0}, {VOICE: 1, MOTION: 1, STOP: 2, WAVE: 3, PICTURES: 1}),
        (["parts"], {"text_bytes": 10}, {VOICE: 1, MOTION: 1, STOP: 2, WAVE: 3, PICTURES: 2}),
        (["prefix"], {}, {VOICE: 1, GIVEN: 1, MOTION: 1, STOP: 2, WAVE: 3, PICTURES: 1}),
        (["a2v"], {}, {GIVEN: 1, MOTION: 1, WAVE: 1, PICTURES: 1}),
        (["v2a"], {}, {VOICE: 1, MOTION: 1, WAVE: 2}),
        (["v2a", "v2a"], {"particles": 4}, {VOICE: 2, MOTION: 2, DRAFTS: 2, WAVE: 4}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_talker_reads_stop_tests_and_results_alone(pipeline, names, sampling, expected):
    with on_fake_card(pipeline, **sampling) as (audit, moved):
        moved.run([pipeline.jobs[name] for name in names])
    assert audit.reads == Counter(expected) and not audit.waits


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tts", {VOICE: 1, STOP: END, HOP: 5}),
        ("t2av", {VOICE: 1, MOTION: 1, STOP: END, HOP: 4, PICTURES: 3}),
        ("a2v", {GIVEN: 1, MOTION: 1, PICTURES: 5}),
        ("v2a", {VOICE: 1, MOTION: 1, HOP: 3}),
    ],
)
def test_talker_streams_read_stop_test_sound_and_pictures_of_each_hop(pipeline, name, expected):
    """Sound of the first patches comes together, once the decoder has the frames after it."""
    with on_fake_card(pipeline) as (audit, moved):
        list(moved.stream(pipeline.jobs[name]))
    assert audit.reads == Counter(expected) and not audit.waits


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


@pytest.mark.parametrize(
    ("mode", "expected"), [("resynthesis", {DECODED: 2, PICTURES: 2}), ("v2a", {VOICE: 2, MOTION: 2, WAVE: 4})]
)
def test_an_evaluation_reads_what_its_clips_do(pipeline, tmp_path, mode, expected):
    voice = pipeline.jobs["tts"].reference_audio
    face = pipeline.jobs["v2a"].video
    true = Take(audio=Path(voice), video=Path(face), source=Path(face), text="hello")
    clips = [Clip(name, None, true, {}, true) for name in "ab"]
    with on_fake_card(pipeline) as (audit, moved), mock.patch.object(TalkerPipeline, "from_pretrained") as load:
        load.return_value = moved
        write_outputs(clips, tmp_path, "cuda", mode=mode)
    assert len([*tmp_path.glob("*.wav")]) == 2
    assert audit.reads == Counter(expected) and not audit.waits
