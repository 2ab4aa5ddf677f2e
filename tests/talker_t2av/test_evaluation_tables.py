"""The tables of the synthetic corpus, by their short commands, on a corpus of cartoon faces that hum."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from talker_fixtures import save_talker

from corpora.synthetic.expression import pose
from corpora.synthetic.face import Face, draw_motion
from corpora.synthetic.mouth_opening import MouthReader
from corpora.synthetic.visemes import MOUTH, mouth_track
from corpora.synthetic.voices import load_voices
from engine.errors import UserError
from engine.evaluation.clips import Clip, read_corpus
from engine.evaluation.generate import write_or_report
from engine.media.audio import read_audio, write_wav
from engine.media.video import write_video
from engine.metrics.metric import Take
from engine.metrics.speech import _reader
from hicodit.evaluate import exchange
from scripts import evaluate
from talker_t2av.evaluate import write_outputs
from talker_t2av.pipeline import TalkerPipeline

RATE = 24_000
GRAMMAR = Path(__file__).parents[2] / "assets" / "demo" / "grammar.jsgf"
SPANS = [(0.08, 0.2), (0.48, 0.6)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two speakers with two clips each for training and one held-out clip each."""
    root = tmp_path_factory.mktemp("humming")
    rng, t = np.random.default_rng(0), np.arange(round(0.8 * RATE)) / RATE
    on = sum((t >= a) & (t < b) for a, b in SPANS)
    texts = {"train": ["set red in hotel three again", "bin blue at alpha one now"], "seen": ["lay it"]}
    for split, sentences in texts.items():
        rows = []
        for voice in load_voices()[:2]:
            for text in sentences:
                name = f"{split}_{len(rows):06d}"
                track = mouth_track([("A:", a, b) for a, b in SPANS], 20)
                still = draw_motion(np.random.default_rng(len(rows)), 20, np.zeros(20))
                frames = Face(voice.face).render(track, pose("neutral", 1.0), still)
                write_video(root / split / f"{name}.mp4", frames, 25)
                wave = 0.3 * np.sin(2 * np.pi * 220 * t) * on + 1e-3 * rng.standard_normal(len(t))
                write_wav(root / split / f"{name}.wav", wave, RATE)
                row = {"id": name, "split": split, "text": text, "voice": voice.number, "expression": "neutral"}
                rows.append(row | {"mouth": {"open": track[:, MOUTH.index("open")].tolist()}})
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "grammar.jsgf").write_text(GRAMMAR.read_text())
    return root


@pytest.fixture(autouse=True)
def quick_mouth_reader(monkeypatch):
    """The reader of mouths is fitted on 8 faces, not 64."""
    fit = MouthReader.__init__
    monkeypatch.setattr(MouthReader, "__init__", lambda self: fit(self, 8))
    _reader.cache_clear()


def run(monkeypatch, corpus, folder, *words):
    """Exit code and results.json of a command."""
    common = [f"corpus={corpus}", "split=[seen]", f"output={folder}", "workers=1", "media=false", "resamples=50"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", words[0], *common, *map(str, words[1:])])
    code = evaluate.main()
    return code, json.loads((folder / "results.json").read_text())


def test_the_table_of_the_talker(corpus, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pocketsphinx")
    record = f"record={tmp_path}/records/talker"
    code, results = run(
        monkeypatch, corpus, tmp_path, "table=synthetic_talker", f"generate.weights={save_talker(tmp_path)}", record
    )
    systems = results["systems"]
    assert code == 0 and set(systems) == {"t2av", "tts", "a2v", "v2a", "codecs", "true speech"}
    assert "synchrony" not in systems["tts"] and "wer" not in systems["a2v"] and "wer" in systems["v2a"]
    true = systems["true speech"]
    assert true["synchrony"]["value"] > 0.5 > true["synchrony_late"]["value"] and true["runs_away"]["value"] == 0
    assert results["aim"]["wer"] == 3 and "mouth and audio" in capsys.readouterr().out
    (path,) = (tmp_path / "records").glob("*-talker-seen.json")
    assert "values" not in json.loads(path.read_text())["results"]["t2av"]["wer"]


def test_the_table_of_hicodit(corpus, tmp_path, monkeypatch):
    pytest.importorskip("pocketsphinx")
    pytest.importorskip("resemblyzer")
    words = ("table=synthetic_hicodit", "generate.sampling={steps: 1}", "voices={}")
    code, results = run(monkeypatch, corpus, tmp_path, *words)
    systems = results["systems"]
    assert code == 0
    assert set(systems) == {"hicodit", "tokenizer", "expressions_shuffled", "expressions_exchanged", "true speech"}
    assert (
        systems["hicodit"]["evaluations"]["value"] == 3 and systems["true speech"]["energy_correlation"]["clips"] == 2
    )
    before = (tmp_path / "outputs" / "hicodit" / "seen_000000.wav").stat().st_mtime_ns
    run(monkeypatch, corpus, tmp_path, *words)
    assert (tmp_path / "outputs" / "hicodit" / "seen_000000.wav").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="angry"):
        run(monkeypatch, corpus, tmp_path, words[0], "generate.expressions=angry", "only=[hicodit]")


def test_outputs_of_the_talker_are_kept_without_loss_and_completed(corpus, tmp_path):
    clips = read_corpus(corpus, "train", {}, 2)
    assert all(clip.prompt.video not in (None, clip.truth.video) for clip in clips)
    clips = [replace(clip, id=f"speaker/{clip.id}") for clip in clips]  # as LRS2 and LRS3 name theirs
    for _ in range(2):
        write_outputs(clips, tmp_path / "out", "cpu", str(save_talker(tmp_path)), mode="a2v")
        facts = json.loads((tmp_path / "out" / "system.json").read_text())
        assert (facts["precision"], facts["given"]) == ("fp32", "audio")
        for clip in clips:
            sound = read_audio(tmp_path / "out" / f"{clip.id}.wav", RATE)
            np.testing.assert_array_equal(sound, read_audio(clip.truth.audio, RATE))
            assert (tmp_path / "out" / f"{clip.id}.mkv").is_file()
        (tmp_path / "out" / f"{clips[0].id}.wav").unlink()  # an interrupted output is made again
    weights = tmp_path / "talker" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)  # others of the same size
    with pytest.raises(UserError, match="generated with other settings"):
        write_outputs(clips, tmp_path / "out", "cpu", str(tmp_path / "talker"), mode="a2v")
    with pytest.raises(UserError, match="seed"):  # which depends on the clip's position
        write_outputs(clips[1:], tmp_path / "out", "cpu", str(save_talker(tmp_path)), mode="a2v")


def test_recordings_are_resynthesised_by_the_codecs_of_the_talker(corpus, tmp_path):
    clips = read_corpus(corpus, "train", {}, 1)
    write_outputs(clips, tmp_path / "out", "cpu", str(save_talker(tmp_path)), mode="resynthesis", one_pass=True)
    assert (tmp_path / "out" / f"{clips[0].id}.wav").is_file()


def test_a_batch_that_fails_is_written_clip_by_clip(capsys):
    batch = [(number, Clip(f"clip{number}", None, Take(), {})) for number in range(3)]
    written = []

    def write(clips):
        if len(clips) > 1 or clips[0][0] == 1:
            raise MemoryError("too large")
        written.extend(clips)

    write_or_report(write, batch)
    assert written == [batch[0], batch[2]]
    assert capsys.readouterr().err == "failed: clip1: unexpected MemoryError: too large\n"


def test_faces_move_to_the_speech_of_another_system(corpus, tmp_path):
    """The audio-driven rows of the paper's table of orders are driven by the authors' own T2AV speech."""
    clips, release = read_corpus(corpus, "train", {}, 2), str(save_talker(tmp_path))
    spoken, driven = tmp_path / "spoken", tmp_path / "driven"
    write_wav(spoken / f"{clips[0].id}.wav", np.linspace(-0.5, 0.5, 9600, dtype=np.float32), RATE, lossless=True)
    write_outputs(clips, driven, "cpu", release, mode="a2v", driving=str(spoken))
    written, given = (read_audio(folder / f"{clips[0].id}.wav", RATE) for folder in (driven, spoken))
    np.testing.assert_array_equal(written, given)
    assert not (driven / f"{clips[1].id}.wav").exists()  # the other system has no output of that clip
    facts = json.loads((driven / "system.json").read_text())
    assert (facts["driving"], facts["given"]) == ("spoken", "audio")


@pytest.mark.parametrize(
    ("settings", "parts", "prefix"),
    [
        ({"one_pass": True, "sampling": {"temperature": 0.7}}, 1, 0),
        ({"sampling": {"temperature": 0.7, "text_bytes": 15}}, 5, 0),
        ({"sampling": {"temperature": 0.7}, "compat": "official", "prefix_seconds": 0.5}, 1, 3),
    ],
    ids=["paper", "in parts", "released program"],
)
def test_the_protocol_of_a_table_reaches_the_requests(corpus, tmp_path, monkeypatch, settings, parts, prefix):
    (clip,) = read_corpus(corpus, "train", {}, 1)
    clip = replace(clip, truth=replace(clip.truth, text="say it again " * 5))
    prepared = []

    def stop_here(self, jobs):
        prepared.extend(self.prepare(job) for job in jobs)
        raise UserError("enough")

    monkeypatch.setattr(TalkerPipeline, "run", stop_here)
    write_outputs([clip], tmp_path / "out", "cpu", str(save_talker(tmp_path)), **settings)
    facts = json.loads((tmp_path / "out" / "system.json").read_text())
    request = prepared[0].requests[0]
    assert (len(prepared[0].requests), request.prefix) == (parts, prefix)
    assert prepared[0].job.keeps_prefix == ("compat" in settings) == (request.rules.stop_hits == 3)
    assert facts["sampling"]["temperature"] == 0.7 and facts.get("compat") == settings.get("compat")


def test_expressions_before_and_after_a_change_are_exchanged():
    assert exchange(np.array([3, 3, 5, 1])).tolist() == [1, 1, 5, 3]
    assert exchange(np.array([3, 3])).tolist() == [3, 3]
