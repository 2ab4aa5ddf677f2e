"""Whose voice an output has, and shuffles that leave nothing in place."""

import sys

import numpy as np
import pytest

import hicodit.evaluation
from hicodit.evaluation import derangement, voice_figures
from scripts import evaluate

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
    evaluate.main()
    (pipeline,) = measured
    assert (pipeline.sampler.method, pipeline.sampler.steps, pipeline.sampler.temperature) == ("ordered", 5, 0)
    assert (pipeline.guidance.all, pipeline.guidance.identity) == (2.5, 0)
