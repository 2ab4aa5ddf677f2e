"""`infer.py model=talker_t2av mode=v2a text=auto`: where the words and the voice of a clip come from."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import jiwer
import pytest
import soundfile

import infer
from corpora.clip_words import FACE, ClipWords
from talker_t2av.settings import AutoConfig

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo"
SAID = (DEMO / "silent.txt").read_text().strip()


@pytest.fixture
def clip(tmp_path) -> Path:
    """The silent demo clip, with no words beside it."""
    (tmp_path / "speaker").mkdir()
    return Path(shutil.copy(DEMO / "silent.mp4", tmp_path / "speaker" / "one.mp4"))


def run(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["infer.py", "model=talker_t2av", "sampling.particles=1", *map(str, words)])
    return infer.main()


@pytest.mark.parametrize(
    ("files", "heard", "words"),
    [
        ({"speaker/one.txt": "Set red.\n"}, None, ("Set red.", "transcript, one.txt")),
        ({"speaker/one.txt": "Text:  SET RED\nConf: 2"}, None, ("SET RED", "transcript, one.txt")),  # as in LRS3
        ({"speaker/one.txt": "first", "lips.txt": "second"}, "lips.txt", ("first", "transcript, one.txt")),
        ({"lips.jsonl": '{"id": "one", "heard": "no"}\n{"id": "speaker/one", "heard": "set red"}'}, "lips.jsonl",
         ("set red", "lip reader, lips.jsonl")),
        ({"lips.jsonl": '{"id": "two", "heard": "set red"}'}, "lips.jsonl", None),
        ({"lips/speaker/one.txt": "SET RED"}, "lips", ("set red", "lip reader, lips")),
        ({"lips/one.txt": "hyp: SET RED"}, "lips", ("set red", "lip reader, lips")),
        ({"lips.log": "loading\ntranscript: SET RED\n"}, "lips.log", ("set red", "lip reader, lips.log")),
        ({}, None, None),
    ],
)  # fmt: skip
def test_words_are_found_in_files_beside_or_named(clip, tmp_path, files, heard, words):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    found = ClipWords(AutoConfig(heard=heard and str(tmp_path / heard))).written(str(clip))
    assert found == words


def test_a_silent_clip_alone_gets_words_and_a_voice(clip, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pocketsphinx")
    assert run(monkeypatch, "mode=v2a", "text=auto", f"video={clip}", f"output={tmp_path}/out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["v2a.json", "v2a.mp4", "v2a.wav"]
    facts = json.loads((tmp_path / "out" / "v2a.json").read_text())
    assert jiwer.wer(SAID.lower(), facts["text"].lower()) <= 1 / 6, facts
    assert facts["text_origin"] == "the corpus's recogniser, on HiCoDiT's speech" and facts["voice_origin"] == FACE
    line = capsys.readouterr().out.splitlines()[0]
    assert facts["text"] in line and facts["text_origin"] in line and FACE in line
    assert soundfile.info(tmp_path / "out" / "v2a.wav").duration == pytest.approx(57 / 25)


def test_jobs_find_words_each_for_itself(clip, tmp_path, monkeypatch, capsys):
    """Where words and a voice are given, HiCoDiT is not loaded."""
    pytest.importorskip("pocketsphinx")
    (tmp_path / "lips.jsonl").write_text('{"id": "one", "heard": "lay red at alpha one now"}\n')
    lines = [
        {"name": "one", "video": str(clip)},
        {"name": "two", "video": str(DEMO / "silent.mp4")},
        {"name": "three", "video": "nowhere.mp4"},
        {"name": "four", "mode": "tts"},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "empty").mkdir()
    common = f"mode=v2a text=auto jobs={tmp_path}/jobs.jsonl reference_audio={DEMO}/voice.wav output={tmp_path}/out"
    sources = f"auto.heard={tmp_path}/lips.jsonl auto.hicodit={tmp_path}/empty timestamps=true"
    assert run(monkeypatch, *common.split(), *sources.split()) == 1
    one, two = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["text"], one["text_origin"]) == ("lay red at alpha one now", "lip reader, lips.jsonl")
    assert (two["text"], two["text_origin"]) == (SAID, "transcript, silent.txt")
    assert one["voice_origin"] == "voice.wav" and one["origin"] == "text" and "words" in one
    errors = capsys.readouterr().err
    assert "no such file: nowhere.mp4" in errors and "line 4: text=auto belongs to mode=v2a" in errors
