"""Whose voice an output has, and shuffles that leave nothing in place."""

import sys

import numpy as np
import pytest

import hicodit.evaluation
from hicodit.evaluation import change_figures, derangement, expressions_of, voice_figures
from scripts import corpus_figures

A, B, C = np.eye(3)


def figures(true, made, voices, known=None):
    return voice_figures(np.stack(true), np.stack(made), np.stack(true), voices, known)


def test_a_clip_is_no_witness_of_its_own_voice():
    found = figures([A, A, B, C], [A, B, B, C], ["1", "1", "2", "3"])
    assert found["voice_first_clean"] == 1 and found["voice_first"] == 0.5  # of the two clips whose voice has another
    assert found["voice_similarity"] == pytest.approx(0.5)
    assert figures([A, B], [A, B], ["1", "2"]) == {}


def test_known_voices_need_no_other_clip():
    found = figures([A, B], [A, A], ["1", "2"], {"1": A, "2": B, "3": C})
    assert (found["voices"], found["voice_first"], found["voice_first_resynthesis"]) == (3, 0.5, 1)


def test_a_derangement_moves_everything():
    for size in (2, 3, 10):
        order = derangement(size, np.random.default_rng(size))
        assert sorted(order) == list(range(size)) and not (order == np.arange(size)).any()


def test_the_command_measures_a_preset_of_the_sampler(monkeypatch, tmp_path):
    measured = []
    monkeypatch.setattr(hicodit.evaluation, "evaluate_corpus", lambda pipeline, *_: measured.append(pipeline) or {})
    words = ["--sampler", "fast", "--steps", "5", "--words-only", "--splits", "seen", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "hicodit", *words])
    corpus_figures.main()
    (pipeline,) = measured
    assert (pipeline.sampler.method, pipeline.sampler.steps, pipeline.sampler.temperature) == ("confidence", 5, 0.7)
    assert (pipeline.guidance.all, pipeline.guidance.identity) == (2.5, 0)


def glide(low: float, high: float, seconds: float, rate: int) -> np.ndarray:
    """A voiced sound whose pitch moves between two frequencies in Hz twice a second."""
    time = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(low + (high - low) * (0.5 + 0.5 * np.sin(4 * np.pi * time))) / rate
    return sum(np.sin(n * phase) / n for n in range(1, 6)) * 0.1


def test_a_change_of_expression_is_right_where_prosody_moves_as_in_the_true_clips():
    pytest.importorskip("librosa")
    rate = 24_000
    flat, lively = glide(150, 155, 1.0, rate), 2 * glide(120, 200, 1.0, rate)
    rows = [
        {"expressions": ["sad"] * 2 + ["surprised"] * 2, "change": 1.0, "phonemes": [["a", 0.0, 0.9], ["b", 1.0, 1.9]]},
        {"expressions": ["surprised"] * 2 + ["sad"] * 2, "change": 1.0, "phonemes": [["a", 0.0, 0.9], ["b", 1.0, 1.9]]},
        {"expressions": ["sad"] * 4, "change": None, "phonemes": [["a", 0.0, 1.9]]},
    ]
    true = [np.concatenate(parts) for parts in ((flat, lively), (lively, flat), (flat, flat))]
    figures = change_figures(rows, {"clean": true, "": [true[0], true[0], true[2]]}, rate)
    assert figures["clips_that_change"] == 2
    assert figures["pitch_range_changes_rightly_clean"] == figures["energy_changes_rightly_clean"] == 1
    assert figures["pitch_range_changes_rightly"] == figures["energy_changes_rightly"] == 0.5
    assert change_figures(rows[2:], {"clean": true[2:]}, rate) == {}


def test_the_true_expressions_of_a_clip_are_by_half_second_or_one_for_all():
    assert expressions_of({"expressions": ["sad", "happy"]}, 2).tolist() == [2, 1]
    assert expressions_of({"expression": "angry"}, 3).tolist() == [6, 6, 6]
