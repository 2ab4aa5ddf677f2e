"""The bundled weights: their size, their cards, and the speech that they generate for the demo clip."""

from pathlib import Path

import jiwer
import numpy as np
import pytest

from engine.media.ffmpeg import probe
from hicodit.pipeline import HiCoDiTPipeline

ASSETS = Path(__file__).resolve().parents[1] / "assets"
RELEASES = [folder for folder in ASSETS.iterdir() if (folder / "model.safetensors").is_file()]


def test_assets_stay_small():
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) < 60e6


@pytest.mark.parametrize("folder", RELEASES, ids=lambda p: p.name)
def test_every_card_has_the_training_command_and_results(folder):
    card = (folder / "README.md").read_text()
    assert "train.py experiment=" in card and "seed" in card and "| " in card


def test_the_speech_of_the_silent_demo_clip_is_intelligible():
    recogniser = pytest.importorskip("engine.metrics.recogniser")
    pytest.importorskip("pocketsphinx")
    clip = ASSETS / "demo" / "silent.mp4"
    assert not probe(clip).audio
    speech = HiCoDiTPipeline.from_pretrained()(clip, seed=0)
    said = (ASSETS / "demo" / "silent.txt").read_text().split()
    assert np.mean(np.abs(speech.wave) > 0.99) < 1e-3  # not clipped
    heard = recogniser.Recogniser(ASSETS / "demo" / "grammar.jsgf").transcribe(speech.wave, speech.rate)
    assert jiwer.wer(" ".join(said), heard) <= 1 / len(said), heard
