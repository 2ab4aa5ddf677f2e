"""Figures of held-out clips: whose voice an output has, moves at a change; shuffles that leave nothing in place."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import hicodit.evaluation
import hicodit.held_out
from hicodit.evaluation import derangement, exchange, expressions_of, overall
from hicodit.held_out import HeldOut
from scripts import corpus_figures

A, B, C = np.eye(3)


def held_out(rows, rate=1, **how):
    return HeldOut(Path(), "", rows, [], rate, **how)


def voices(true, made, names, known=None):
    """Figures of voices of made and of true vectors; without `known`, the true ones are of the known voices."""
    clips = held_out([{"id": str(i), "voice": name} for i, name in enumerate(names)])
    clips.true_vectors = true
    clips.known = known or clips.true_voices()
    return clips.voices(made), clips.voices(true)


def test_a_clip_is_no_witness_of_its_own_voice():
    made, true = voices([A, A, B, C], [A, B, B, C], "1123")
    assert true["own_voice_first"] == [(1, 1), (1, 1), None, None]  # two clips have a voice that another has, too
    assert made["own_voice_first"] == [(1, 1), (0, 1), None, None]
    assert [pair[0] for pair in made["voice_similarity"][:2]] == pytest.approx([1, 0])
    assert voices([A, B], [A, B], "12")[0] == {"own_voice_first": [None] * 2, "voice_similarity": [None] * 2}


def test_known_voices_need_no_other_clip():
    known = {name: {"mean": vector} for name, vector in zip("123", (A, B, C))}
    made, true = voices([A, B], [A, A], "12", known)
    assert made["own_voice_first"] == [(1, 1), (0, 1)] and true["own_voice_first"] == [(1, 1), (1, 1)]
    assert voices([A], [A], "4", known)[0]["own_voice_first"] == [None]  # it is none of them


def test_silence_has_nobodys_voice():
    pytest.importorskip("resemblyzer")
    clips = held_out([{"id": "x", "voice": 1}], 16_000, known={"1": {"mean": np.ones(256, np.float32)}})
    found = clips.voices(clips.embed([np.zeros(16_000, np.float32)]))
    assert found == {"own_voice_first": [(0, 1)], "voice_similarity": [(0, 1)]}


def test_a_recorded_figure_is_that_of_the_clips_that_count():
    pairs = {"wer_free": [(1, 2), None, (0, 2)], "wer": [None] * 3, "own_voice_first": [(1, 1), (0, 1), None]}
    pairs["energy_correlation"] = [(0, 1), (1, 3), (2, 5)]
    assert overall(pairs, "clean") == {
        "wer_clean_free": 0.25,
        "voice_first_clean": 0.5,
        "energy_correlation_clean": pytest.approx(1),
    }
    assert overall({"pitch_range_right_way": [(1, 1)]}) == {"pitch_range_changes_rightly": 1}


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
    clips = held_out(rows, rate, whole=1)
    clips.true = true
    made = clips.measure([true[0], true[0], true[2]])
    assert len(made["prosody"]) == 1 and made["prosody"] == clips.truth["prosody"][:1]
    for name in ("pitch_range_right_way", "energy_right_way"):
        assert clips.moves(clips.truth["changes"])[name] == [(1, 1), (1, 1), None]
        assert clips.moves(made["changes"])[name] == [(1, 1), (0, 1), None]
    alone = held_out(rows[2:], rate, whole=0)
    alone.true = true[2:]
    assert set(map(tuple, alone.moves(alone.truth["changes"]).values())) == {(None,)}


def test_pitch_before_and_after_a_change_is_cut_from_that_of_the_clip(monkeypatch):
    """A wave of ones or zeros stands for its own pitch: one frame of 16 ms has 100 samples here."""
    searched = []
    monkeypatch.setattr(hicodit.held_out, "pitch", lambda wave, rate: searched.append(len(wave)) or wave[::100])
    monkeypatch.setattr(hicodit.held_out, "pitch_range", lambda f0: float(f0.mean()))
    row = {"change": 0.8, "phonemes": [["a", 0.0, 0.8], ["b", 0.8, 1.6]], "expressions": ["sad", "happy"]}
    rise = np.repeat([0.0, 1.0], 5000)
    found = held_out([row], 6250).measure([rise])
    assert [part[0] for part in found["changes"][0]] == [0, 1] and found["prosody"][0][0] == 0.5
    assert searched == [10_000]


@pytest.mark.parametrize("listens", [True, False])
def test_a_voice_that_follows_its_expression_turns_when_expressions_are_exchanged(monkeypatch, listens):
    """Crops stand for the classes that a clip shows; its sound is loud where they are happy."""
    rate, names = 1000, ["neutral", "happy"]
    phonemes = [["a", 0.0, 0.5], ["b", 0.5, 1.0]]
    rows = [{"id": str(i), "text": "a", "voice": i % 2, "change": 0.5, "phonemes": phonemes} for i in range(4)]
    rows = [row | {"expressions": names if i < 2 else names[::-1]} for i, row in enumerate(rows)]
    clips = held_out(rows, rate)
    clips.crops = [expressions_of(row, 2) for row in rows]

    def speak(classes):
        loud = np.repeat(np.where(np.array(classes) == clips.crops[0][1], 0.5, 0.1), rate // 2)
        return SimpleNamespace(wave=loud.astype(np.float32), rate=rate, expression=np.array(classes))

    def synthesise(pipeline, crops, seed=0, batch=16, expressions=None):
        return [speak(classes) for classes in (expressions if listens and expressions is not None else crops)]

    clips.true = [speak(shown).wave for shown in clips.crops]
    clips.resynthesis = lambda pipeline: clips.true
    clips.transcribe = lambda waves: ["a"] * len(waves)
    clips.words = lambda heard: {"wer": [(0, 1)] * len(heard), "wer_free": [None] * len(heard)}
    clips.embed = lambda waves: [np.ones(256, np.float32)] * len(waves)
    monkeypatch.setattr(hicodit.evaluation, "synthesise", synthesise)
    for module in (hicodit.evaluation, hicodit.held_out):
        monkeypatch.setattr(module, "pitch", lambda wave, rate: np.full(100, 100.0))
    monkeypatch.setattr(hicodit.evaluation, "prosody", lambda wave, rate: (0.0, float(wave.mean())))
    monkeypatch.setattr(HeldOut, "recorded", lambda *_, **how: clips)
    found = hicodit.evaluation.evaluate_corpus(SimpleNamespace(codec=None), Path(), "dev")
    assert (found["clips_that_change"], found["energy_changes_rightly"]) == (4, 1)
    assert found["energy_changes_rightly_expressions_exchanged"] == (0 if listens else 1)


def test_expressions_before_and_after_a_change_are_exchanged():
    assert exchange(np.array([3, 3, 5, 1])).tolist() == [1, 1, 5, 3]
    assert exchange(np.array([3, 3])).tolist() == [3, 3]


def test_the_true_expressions_of_a_clip_are_by_half_second_or_one_for_all():
    assert expressions_of({"expressions": ["sad", "happy"]}, 2).tolist() == [2, 1]
    assert expressions_of({"expression": "angry"}, 3).tolist() == [6, 6, 6]
