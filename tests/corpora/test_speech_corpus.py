"""A corpus of human and synthetic speech: its splits, its repetitions, and what it refuses."""

import json

import numpy as np
import pytest
import soundfile

from corpora.preparation.speech_corpus import RATE, grid_recordings, prompt_recordings, write_corpus
from tests.media_files import ffmpeg

SENTENCES = [f"bbaf{digit}{adverb}" for digit in "z123456789" for adverb in "anps"]


def sound(path, seconds: float, *form: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ffmpeg("-f", "lavfi", "-i", f"sine=frequency=300:sample_rate=16000:duration={seconds}", *form, path)


def test_sentences_of_training_speakers_are_divided_and_new_speakers_kept_apart(tmp_path):
    for speaker in ("s1", "s31"):
        for name in SENTENCES:
            path = tmp_path / speaker / f"{name}.mp4"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    found = grid_recordings(tmp_path, ["s1"], ["s31"])
    assert {split: len(rows) for split, rows in found.items()} == {"train": 36, "val": 2, "test": 2, "new": 40}
    assert {row.speaker for row in found["new"]} == {"s31"}
    assert {row.name for row in found["train"]}.isdisjoint(row.name for row in found["test"])


def test_prompts_are_decoded_and_repeated_as_requested(tmp_path):
    sound(tmp_path / "sounds/en_US/digits/1.g722", 1.0, "-c:a", "g722")
    sound(tmp_path / "sounds/en_US/beep.g722", 0.1, "-c:a", "g722")  # too short
    rows = prompt_recordings(tmp_path / "sounds")
    assert {(row.name, row.speaker) for row in rows} == {("en_US-digits-1", "en_US"), ("en_US-beep", "en_US")}
    write_corpus(tmp_path / "out", {"train": [(row, 2) for row in rows]}, {})
    listed = [json.loads(line)["id"] for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert listed == ["en_US-digits-1"] * 2
    wave, rate = soundfile.read(tmp_path / "out/train/en_US-digits-1.wav")
    spectrum = np.abs(np.fft.rfft(wave[: RATE // 2]))
    assert rate == RATE and abs(len(wave) / RATE - 1.0) < 0.01
    assert np.argmax(spectrum) * 2 == pytest.approx(300, abs=4)
