"""The bundled weights: small, carded, and able to do the README's main job."""

from pathlib import Path

import jiwer
import numpy as np
import pytest

from engine.config import load, plain
from engine.media.ffmpeg import probe
from engine.settings import make, override
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import InferConfig

ASSETS = Path(__file__).resolve().parents[1] / "assets"
RELEASES = [folder for folder in ASSETS.iterdir() if (folder / "model.safetensors").is_file()]


def test_assets_stay_small():
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) < 60e6


@pytest.mark.parametrize("folder", RELEASES, ids=lambda p: p.name)
def test_every_release_has_a_card_with_command_seed_and_results(folder):
    card = (folder / "README.md").read_text()
    assert "train.py experiment=" in card and "seed" in card and "| " in card


def test_the_default_sampler_takes_thirty_evaluations_and_the_papers_is_an_override_away():
    pipeline = HiCoDiTPipeline.from_pretrained()
    paper = make(InferConfig, plain(load("infer", ["sampler=paper"])))
    counts = []
    for changes in (InferConfig(), paper):
        sampler = override(pipeline.sampler, changes.sampler)
        guidance = override(pipeline.guidance, changes.guidance)
        counts.append(sampler.steps * len(guidance.branches))
    assert counts == [30, 320]


def test_the_silent_clip_is_silent_and_speaks_intelligibly():
    recogniser = pytest.importorskip("engine.metrics.recogniser")
    pytest.importorskip("pocketsphinx")
    clip = ASSETS / "demo" / "silent.mp4"
    assert not probe(clip).audio
    speech = HiCoDiTPipeline.from_pretrained()(clip, seed=0)
    said = (ASSETS / "demo" / "silent.txt").read_text().split()
    heard = recogniser.Recogniser(ASSETS / "demo" / "grammar.jsgf").transcribe(speech.wave, speech.rate)
    assert jiwer.wer(" ".join(said), heard) <= 1 / len(said), heard


def test_speech_of_the_bundled_model_is_not_clipped_or_silent():
    speech = HiCoDiTPipeline.from_pretrained()(ASSETS / "demo" / "silent.mp4", seed=0, steps=8)
    level = 20 * np.log10(np.sqrt(np.mean(np.square(speech.wave))) + 1e-9)
    assert -40 < level < -6 and np.mean(np.abs(speech.wave) > 0.99) < 1e-3
