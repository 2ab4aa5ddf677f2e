"""Particles of V2A: weights from the motion loss, resampling, and independence of the batch.

Axes: R requests, n drafts, S steps, F frames, P frames of a patch, C channels.
"""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from talker_fixtures import face_file, request, save_talker, tiny_model, utterance, voice_file

from engine.seeding import generator_for
from talker_t2av import particles
from talker_t2av.losses import training_forward
from talker_t2av.particles import TIMES, Particles
from talker_t2av.pipeline import Job, TalkerPipeline
from talker_t2av.request import MODES, Sampling
from talker_t2av.task import TalkerTask
from tests.gpu.dying_graphs import DyingOutputs

V2A = MODES["v2a"]
P = 4
SAMPLING = Sampling(steps=3, guidance=1.5, particles=4, particle_temperature=1.0)


def run(model, requests, backend=None):
    """Run the requests; return the decoder and the result of each request."""
    decoder = Particles(model, V2A, SAMPLING, len(requests), backend=backend)
    rows = [decoder.join(asked) for asked in requests]
    while decoder.active:
        decoder.step()
    return decoder, [decoder.result(row) for row in rows]


def all_drafts(decoder):
    """The speech (B, F, C) of all drafts that are alive at the end."""
    return torch.stack([decoder.candidate(slot).speech for slot in range(len(decoder.ended))])


@pytest.mark.parametrize(("delay", "context", "prefix"), [(0, 1, 0), (1, 1, 0), (0, 2, 3), (2, 1, 2)])
def test_particles_are_weighted_by_the_motion_loss_of_the_training_forward(monkeypatch, delay, context, prefix):
    """The error of each step is that of the training forward on the finished draft, at the same times and noise."""
    model = tiny_model(delay, context)
    patches = 5
    asked = request(speech=P * prefix, motion=P * (prefix + patches), prefix=prefix)
    monkeypatch.setattr(particles, "SHARPNESS", 0.0)  # no draft is replaced
    errors = []
    own = Particles.errors
    monkeypatch.setattr(Particles, "errors", lambda decoder, index: errors.append(own(decoder, index)) or errors[-1])
    decoder, _ = run(model, [asked])
    drafts = all_drafts(decoder)
    assert len(drafts) == SAMPLING.particles and len(errors) == patches
    for number, draft in enumerate(drafts):
        batch = utterance(asked, torch.cat([asked.speech, draft]), asked.motion, prefix + patches + delay)
        with torch.no_grad():
            m = training_forward(model, batch).motion
            for step in range(patches):
                place = (prefix + step - delay) * model.config.repeats  # among the examples, patch by patch
                if place < 0:
                    assert decoder.given["counts"][step, 0] == 0
                    continue
                z = torch.randn((TIMES, *m.x1.shape[1:]), generator=generator_for(asked.seed, "weigh", step))
                t = decoder.times[:, None, None]
                x1 = m.x1[place]
                several = [value[place].expand(TIMES, *value.shape[1:]) for value in (m.mu, m.cond, m.global_cond)]
                velocity = model.motion_cfm.estimator((1 - t) * x1 + t * z, several[0], decoder.times, *several[1:])
                expected = (velocity - (z - x1)).square().mean()
                assert decoder.given["counts"][step, 0] == 1
                torch.testing.assert_close(errors[step][0, number], expected, atol=2e-5, rtol=1e-4)


def test_likely_particles_replace_unlikely_ones(monkeypatch):
    """Weights are of each request alone; a draft that continues takes its cache, frames and hidden state along."""
    model = tiny_model()
    asked = [request(motion=P * 6), request(9, 1, motion=P * 6)]
    errors = torch.zeros(2, 4)
    errors[0, 0] = errors[0, 1] = errors[0, 3] = 1.0  # draft 2 of the first request; those of the second are alike
    monkeypatch.setattr(Particles, "errors", lambda decoder, index: errors if index == 3 else 0 * errors)
    with monkeypatch.context() as patched:
        patched.setattr(particles, "SHARPNESS", 0.0)
        drawn = all_drafts(run(model, asked)[0]).unflatten(1, (-1, P))
    whole, _ = run(model, asked)
    found = all_drafts(whole).unflatten(1, (-1, P))  # (B, S, P, C)
    torch.testing.assert_close(found[4:], drawn[4:])
    torch.testing.assert_close(found[:4, :3], drawn[2:3, :3].expand(4, -1, -1, -1))
    assert (found[0, 3] - found[1, 3]).abs().max() > 1e-3  # each continues with noise of its own
    torch.testing.assert_close(found[2], drawn[2])  # it continued as it would have alone: cache and state are its own
    assert whole.log_weights[0].eq(0).all()


def test_the_most_likely_particle_is_the_result(monkeypatch):
    errors = torch.tensor([[0.002, 0.001, 0.0, 0.003]])
    monkeypatch.setattr(Particles, "errors", lambda decoder, index: errors)
    decoder, (result,) = run(tiny_model(), [request(motion=P * 3)])
    torch.testing.assert_close(result.speech, all_drafts(decoder)[2], atol=0, rtol=0)


def test_a_request_in_a_batch_equals_the_request_alone():
    """Motions of different lengths: a request that has ended keeps its weights. Steps are graphs whose outputs die."""
    model = tiny_model(context=2)
    asked = [request(3 + seed, seed, motion=P * (2 + 2 * seed)) for seed in range(3)]
    _, together = run(model, asked, DyingOutputs())
    for own, result in zip(asked, together):
        assert len(result.speech) == len(own.motion)
        _, (alone,) = run(model, [own])
        torch.testing.assert_close(alone.speech, result.speech, atol=1e-4, rtol=0)


def test_the_pipeline_samples_particles_and_streams_a_single_one(tmp_path):
    pipeline = TalkerPipeline.from_pretrained(save_talker(tmp_path), precision="fp32")
    voice = str(voice_file(tmp_path / "v.wav"))
    face = str(face_file(tmp_path / "f.mp4"))
    job = Job("v2a", "hello", voice, video=face, crop="centre", seed=3)
    one = pipeline(job)
    pipeline.sampling = replace(pipeline.sampling, particles=3)
    several = pipeline(job)
    again = pipeline(job)
    assert several.wave.shape == one.wave.shape and not np.allclose(several.wave, one.wave)
    np.testing.assert_array_equal(several.wave, again.wave)
    streamed = np.concatenate([chunk.wave for chunk in pipeline.stream(job)])
    np.testing.assert_allclose(streamed, one.wave, atol=1e-4)


@pytest.mark.parametrize(("order", "expected"), [("add", 4), ("av", 1)])
def test_a_release_that_cannot_weight_particles_uses_one(order, expected):
    config = tiny_model(order=order, motion_dim=40).config  # 40: the released statistics
    task = TalkerTask(asdict(config), {}, sampling={"particles": 4}, stats=None)
    assert task.sampling.particles == expected
