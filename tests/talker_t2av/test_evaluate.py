"""Measures of the evaluation on made cases, and the whole command on a corpus of drawn faces that hum."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from talker_fixtures import save_talker

from corpora.synthetic.expression import pose
from corpora.synthetic.face import Face, draw_motion
from corpora.synthetic.mouth_opening import MouthReader
from corpora.synthetic.visemes import MOUTH, mouth_track
from corpora.synthetic.voices import load_voices
from engine.evaluation.clips import read_clips
from engine.media.audio import write_wav
from engine.media.video import write_video
from engine.metrics.recogniser import CorpusRecogniser
from engine.metrics.speech import loudness, speech_end, synchrony
from scripts import corpus_figures
from talker_t2av.evaluation import HeldOut, endings, write_outputs
from talker_t2av.pipeline import Talk

RATE = 24_000
GRAMMAR = Path(__file__).parents[2] / "assets" / "demo" / "grammar.jsgf"


def hum(*spans: tuple[float, float], seconds: float) -> np.ndarray:
    """A tone in the given spans of seconds, room tone elsewhere."""
    t = np.arange(round(seconds * RATE)) / RATE
    on = sum((t >= a) & (t < b) for a, b in spans)
    return (0.3 * np.sin(2 * np.pi * 220 * t) * on + 1e-3 * np.random.default_rng(0).standard_normal(len(t))).astype(
        "f4"
    )


def test_speech_ends_where_its_energy_does():
    assert speech_end(hum((0.2, 0.5), (0.8, 1.23), seconds=1.5), RATE) == pytest.approx(1.23, abs=0.011)
    assert speech_end(hum((0.2, 1.0), seconds=1.0), RATE) == pytest.approx(1.0)
    assert speech_end(np.zeros(RATE), RATE) == 0


def test_synchrony_finds_the_shift():
    wave = hum((0.2, 0.4), (0.8, 0.9), (1.3, 1.7), seconds=2.4)
    mouth = loudness(wave, RATE)
    assert synchrony(mouth, wave, RATE) == pytest.approx(1)
    early = np.roll(mouth, -5)  # the mouth 200 ms ahead of the sound
    assert synchrony(early, wave, RATE, -5) > 0.99 > 0.5 > synchrony(early, wave, RATE)
    late = np.roll(mouth, 5)
    assert synchrony(late, wave, RATE, 5) > 0.99 > 0.5 > synchrony(late, wave, RATE)
    assert synchrony(np.zeros(60), wave, RATE) == 0


def test_endings_tell_late_cut_and_endless_apart():
    def talk(quiet: float, stopped: bool = True) -> Talk:
        return Talk(hum((0.1, 1.0), seconds=1.0 + quiet), None, None, None, stopped)

    found = endings([talk(0.15), talk(0.28), talk(0.5), talk(0.0), talk(0.2, stopped=False)])
    shares = {name: found[name] for name in ("ends_in_time", "ends_late", "ends_cut", "endless")}
    assert shares == pytest.approx({"ends_in_time": 0.4, "ends_late": 0.2, "ends_cut": 0.2, "endless": 0.2})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two speakers with two clips each for training and one held-out clip each."""
    root = tmp_path_factory.mktemp("humming")
    for split, texts in (
        ("train", ["set red in hotel three again", "bin blue at alpha one now"]),
        ("seen", ["lay it"]),
    ):
        rows = []
        for voice in load_voices()[:2]:
            for text in texts:
                name = f"{split}_{len(rows):06d}"
                spans = [(0.08, 0.2), (0.48, 0.6)]
                track = mouth_track([("A:", a, b) for a, b in spans], 20)
                who = voice.face
                still = draw_motion(np.random.default_rng(len(rows)), 20, np.zeros(20))
                write_video(root / split / f"{name}.mp4", Face(who).render(track, pose("neutral", 1.0), still), 25)
                write_wav(root / split / f"{name}.wav", hum(*spans, seconds=0.8), RATE)
                row = {"id": name, "split": split, "text": text, "voice": voice.number, "expression": "neutral"}
                rows.append(row | {"mouth": {"open": track[:, MOUTH.index("open")].tolist()}})
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "grammar.jsgf").write_text(GRAMMAR.read_text())
    return root


def test_the_whole_command(corpus, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pocketsphinx")
    weights = save_talker(tmp_path)
    monkeypatch.setattr(corpus_figures, "MouthReader", lambda: MouthReader(8))
    arguments = ["--corpus", corpus, "--weights", weights, "--clips", 2, "--out", tmp_path / "out"]
    arguments += ["--figure", tmp_path / "figure.png"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", "talker_t2av", *map(str, arguments)])
    corpus_figures.main()
    (path,) = (tmp_path / "out").glob(f"*-{weights.name}.json")
    results = json.loads(path.read_text())["results"]["seen"]
    assert set(results) == {"true", "t2av", "tts", "v2a", "a2v", "stream", "batch"}
    assert all(np.isfinite(value) for part in results.values() for value in part.values())
    true = results["true"]
    assert true["mouth_reader_against_drawn"] > 0.9
    assert true["synchrony_true_pairs"] > 0.5 > true["synchrony_true_pairs_200ms_late"]
    assert results["stream"]["join_error_sound"] < 1e-4 and results["stream"]["join_error_picture_of_255"] <= 1
    assert results["batch"]["difference_speech"] < 1e-4 and results["batch"]["difference_motion"] < 1e-4
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "synchrony_true_pairs" in capsys.readouterr().out


def test_free_sentences_have_figures_of_their_own():
    """What each model hears differs, so that no figure can take the place of another."""
    recogniser = object.__new__(CorpusRecogniser)
    recogniser._words = {"lay", "it", "set", "red"}
    recogniser._closed = SimpleNamespace(transcribe=lambda wave, rate: "lay it")
    recogniser._free = SimpleNamespace(transcribe=lambda wave, rate: "the hotel")
    clips = object.__new__(HeldOut)
    clips.recogniser, clips.texts = recogniser, ["lay it", "my hotel", "set it"]
    found = clips.word_errors([hum(seconds=0.1)] * 3, "wer_clean")
    shares = {"wer_clean": 0.25, "wer_clean_free": 0.5}
    assert found == shares | {"wer_clean_texts_shuffled": 0.75, "wer_clean_texts_shuffled_free": 1.0}


def test_a_figure_needs_its_part(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "talker_t2av", "--parts", "tts", "--figure", str(tmp_path / "a.png")])
    with pytest.raises(ValueError, match="--figure"):
        corpus_figures.main()


@pytest.mark.parametrize(
    ("model", "options", "figure"),
    [
        ("rvq_codec", ["--levels", "2", "12"], "perplexity"),
        ("whisperx_vae", [], "latent_std"),
        ("lia_x", ["--chunk", "4"], "mouth_opening_correlation"),
    ],
)
def test_codecs(corpus, tmp_path, monkeypatch, capsys, model, options, figure):
    monkeypatch.setattr(corpus_figures, "MouthReader", lambda: MouthReader(8))
    arguments = [model, "--corpus", corpus, "--splits", "seen", "--clips", 2, "--out", tmp_path, *options]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    corpus_figures.main()
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["arguments"]["clips"] == 2 and figure in record["results"]["seen"]
    assert figure in capsys.readouterr().out
    assert bool(list(tmp_path.glob("*.jpg"))) == (model == "lia_x")


@pytest.mark.parametrize(("mode", "suffix"), [("t2av", ".mp4"), ("tts", ".wav"), ("a2v", ".mp4"), ("v2a", ".wav")])
def test_outputs_for_an_evaluation(corpus, tmp_path, mode, suffix):
    clips = read_clips(corpus / "train.jsonl", corpus / "train", {}, 2)
    assert all(clip.prompt.video not in (None, clip.truth.video) for clip in clips)
    clips = [replace(clip, id=f"speaker/{clip.id}") for clip in clips]  # as LRS2 and LRS3 name theirs
    write_outputs(clips, tmp_path / "out", "cpu", str(save_talker(tmp_path)), mode=mode)
    assert (tmp_path / "out" / "system.json").is_file()
    found = sorted(path.name for path in (tmp_path / "out" / "speaker").iterdir())
    assert [f"speaker/{name}" for name in found] == [f"{clip.id}{suffix}" for clip in clips]
