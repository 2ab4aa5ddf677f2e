"""Claims of Talker-T2AV put to the test: what the variants train with, and what a prefix is."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from omegaconf import OmegaConf

from benchmarks import talker_claims
from benchmarks.talker_claims import ORDERS, order_settings
from engine.config import compose
from engine.metrics.speech import synchrony
from talker_t2av.model import HOP, TalkerConfig
from talker_t2av.pipeline import Job


@pytest.mark.parametrize("order", ORDERS)
def test_variants_are_settings_of_the_recipe_with_equal_rows(order):
    args = Namespace(corpus=Path("c"), train_steps=7, overrides=["trainer.batch_size=3"])
    config = compose("train", order_settings(args, Path("s"), order, 2))
    model = TalkerConfig(**OmegaConf.to_container(config.task.model, resolve=True))
    assert (config.data.train.order, config.data.train.delay) == (model.order, model.delay)
    assert (config.trainer.steps, config.trainer.seed) == (7, 2)
    assert config.trainer.batch_size * len(config.data.train.tasks) == 6
    assert order == "add" or ORDERS[order]


def test_with_a_prefix_the_face_is_given_the_rest_of_the_sound(monkeypatch):
    rate, frames, given = 24_000, 50, 12  # half a second in whole patches of four frames
    wave = np.random.default_rng(0).uniform(-1, 1, frames * HOP).astype(np.float32)
    clips = SimpleNamespace(
        rows=[{"id": "a"}], rate=rate, waves=lambda: [wave], path=lambda row, suffix: f"own{suffix}"
    )
    clips.jobs = lambda mode, seed: [Job(mode, "", audio="own.wav", reference_video="other.mp4")]
    clips.opening = lambda pictures: np.arange(len(pictures)) % 5
    pipeline = SimpleNamespace(system=SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(patch_size=4))))

    def talk(pipeline, jobs, batch):
        (job,) = jobs
        assert (job.reference_audio, job.reference_video, job.prefix_seconds) == ("own.wav", "own.mp4", 0.5)
        heard, found = soundfile.read(job.audio, dtype="float32")
        assert found == rate
        np.testing.assert_allclose(heard, wave[given * HOP :], atol=1e-4)
        return [SimpleNamespace(wave=heard, frames=np.zeros((frames - given, 2, 2, 3), np.uint8))]

    monkeypatch.setattr(talker_claims, "talk", talk)
    found = talker_claims.measure(pipeline, clips, "a2v", 0.5)
    expected = synchrony(np.arange(frames - given) % 5, wave[given * HOP :], rate)
    assert found["synchrony"] == {"a": (expected, 1.0)}


def test_words_are_counted_in_prefix_and_continuation_together(monkeypatch):
    rate, frames, given = 24_000, 50, 12
    wave = np.random.default_rng(0).uniform(-1, 1, frames * HOP).astype(np.float32)
    spoken = SimpleNamespace(
        wave=wave[given * HOP :], frames=np.zeros((frames - given, 2, 2, 3), np.uint8), stopped=True
    )
    clips = SimpleNamespace(
        rows=[{"id": "a"}], texts=["Lay red"], rate=rate, waves=lambda: [wave], path=lambda row, suffix: "own"
    )
    clips.jobs = lambda mode, seed: [Job("tts", "lay red", reference_audio="other.wav")]
    clips.opening = lambda pictures: np.arange(len(pictures)) % 5
    clips.recogniser = SimpleNamespace(
        transcribe_all=lambda texts, waves, rate: ["lay blue now" if len(waves[0]) == len(wave) else ""]
    )
    pipeline = SimpleNamespace(system=SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(patch_size=4))))
    monkeypatch.setattr(talker_claims, "talk", lambda *_: [spoken])
    found = talker_claims.measure(pipeline, clips, "t2av", 0.5)
    assert found["wer"] == {"a": (2, 2)} and found["length_error_s"] == {"a": (0.0, 1.0)}
