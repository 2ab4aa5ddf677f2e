"""Corpora of human speech: their splits and repetitions, which prompts are taken, and where phonemes are."""

import gzip
import json
import sys

import numpy as np
import pytest
import soundfile

from corpora.preparation.speech_corpus import (
    RATE,
    Recording,
    at_speed,
    grid_recordings,
    listed_recordings,
    prompt_recordings,
    write_corpus,
)
from corpora.preparation.voice_corpus import (
    MARGIN,
    PAUSES,
    cut,
    grid_sentences,
    label,
    prompt_sentences,
    speech_range,
    write_voices,
)
from corpora.synthetic.corpus import LEVEL, gain_to_level
from corpora.synthetic.speech import Synthesizer
from corpora.synthetic.visemes import FPS
from engine.errors import UserError
from engine.media.audio import read_audio, resample_wave, write_wav
from engine.media.video import read_video, write_video
from scripts import make_voice_corpus
from tests.corpora.preparation_fakes import write_csv
from tests.media_files import ffmpeg
from tests.shard_files import contents

TEXT = "lay red by seven again"
ROW = {"path": "a.wav", "speaker": "anna"}


@pytest.fixture(scope="module")
def synthesizer():
    return Synthesizer()


@pytest.fixture(scope="module")
def spoken(synthesizer):
    """A slower voice than those that recordings are compared with, and its samples at 24 kHz in noise."""
    found = synthesizer.speak(TEXT, "pitch 80 110", words_per_minute=130)
    speech = resample_wave(found.wave, found.rate, RATE)
    wave = np.random.default_rng(0).normal(0, 1e-3, len(speech) + 2 * RATE).astype(np.float32)
    wave[RATE : RATE + len(speech)] += speech
    return found, wave


def test_the_letter_a_of_a_sentence_is_spelled(tmp_path):
    (tmp_path / "s1").mkdir()
    for name in ("bbaa1a", "lgafzs"):
        (tmp_path / "s1" / f"{name}.mpg").touch()
    found = grid_sentences(tmp_path, ["s1"])
    texts = {row.name: row.text for rows in found.values() for row in rows}
    assert texts == {"s1-bbaa1a": "bin blue at ay one again", "s1-lgafzs": "lay green at f zero soon"}


def test_prompts_without_speech_or_without_a_file_are_left_out(tmp_path):
    (tmp_path / "digits").mkdir()
    for name in ("digits/1", "beep", "press"):
        (tmp_path / f"{name}.g722").touch()
    lines = "; a remark\ndigits/1: one\nbeep: [a tone]\npress: Press * then #\nmissing: hello\n"
    with gzip.open(tmp_path / "texts.gz", "wt") as file:
        file.write(lines)
    rows = prompt_sentences(tmp_path, tmp_path / "texts.gz")
    assert [(row.name, row.text) for row in rows] == [("digits-1", "one"), ("press", "Press star then pound")]


def test_pictures_need_no_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(make_voice_corpus, "SOUNDS", tmp_path / "absent")
    for options, reason in (([], "absent is not a folder: apt-get"), (["--pictures", "1"], "recordings of s1, s3, s5")):
        call = ["make_voice_corpus.py", "--out", tmp_path / "out", "--grid", tmp_path, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, call)))
        with pytest.raises(UserError, match=reason):
            make_voice_corpus.main()


def test_phonemes_are_found_where_they_sound(synthesizer, spoken):
    truth, wave = spoken
    speech = speech_range(wave)
    trimmed = wave[speech]
    start = speech.start / RATE
    assert abs(len(trimmed) / RATE - len(truth.wave) / truth.rate - 2 * MARGIN) < 0.15
    assert abs(start - 1 + MARGIN) < 0.1
    _, phonemes = label(trimmed, TEXT, synthesizer)
    speech, phonemes, later = cut(trimmed, phonemes)
    assert [time * FPS == pytest.approx(round(time * FPS)) for time in (start, later)] == [True, True]
    assert [p[0] for p in phonemes] == [p[0] for p in truth.phonemes]
    shift = phonemes[0][1] - truth.phonemes[0][1]
    late = [found[1] - shift - true[1] for found, true in zip(phonemes, truth.phonemes)]
    assert np.abs(late).mean() < 0.04
    assert abs(len(speech) / RATE - phonemes[-1][2] - MARGIN) < 0.02


def test_a_recording_of_another_length_is_refused(synthesizer, spoken):
    wave = spoken[1]
    assert label(wave[speech_range(wave)], "one", synthesizer) is None


def test_frames_are_cut_with_the_audio(tmp_path, spoken):
    """The third second of sound belongs to frame 75: each frame's brightness is its number."""
    wave = spoken[1]
    frames = np.zeros((len(wave) * FPS // RATE, 32, 32, 3), np.uint8)
    frames += 2 * np.arange(len(frames), dtype=np.uint8)[:, None, None, None]
    write_video(tmp_path / "lrbzsa.mp4", frames, FPS, wave, RATE, lossless=True)
    people = {"train": [Recording("s1-lrbzsa", tmp_path / "lrbzsa.mp4", "s1", TEXT)]}
    assert write_voices(tmp_path / "out", people, None, 0, {}, pictures=True) == {"train": 1}
    row = json.loads((tmp_path / "out" / "train.jsonl").read_text())
    kept = read_video(tmp_path / "out" / "train" / "s1-lrbzsa.mp4", FPS)
    assert len(kept) == row["frames"] and row["face"] == "s1"
    first = round(float(kept[0].mean()) / 2)
    sound = read_audio(tmp_path / "out" / "train" / "s1-lrbzsa.wav", RATE)
    expected = wave[first * RATE // FPS :][: len(sound)]
    assert np.corrcoef(sound, expected)[0, 1] > 0.95
    assert gain_to_level(sound[speech_range(sound)], LEVEL) == pytest.approx(1, abs=0.1)


def test_videos_have_pauses_of_other_lengths_than_speech_alone(tmp_path, spoken):
    wave = spoken[1]
    frames = np.zeros((len(wave) * FPS // RATE, 32, 32, 3), np.uint8)
    write_video(tmp_path / "a.mp4", frames, FPS, wave, RATE, lossless=True)
    people = {"train": [Recording(f"a{number}", tmp_path / "a.mp4", "s1", TEXT) for number in range(6)]}
    pauses = {}
    for pictures in (False, True):
        out = tmp_path / str(pictures)
        write_voices(out, people, None, 0, {}, pictures)
        rows = map(json.loads, (out / "train.jsonl").read_text().splitlines())
        pauses[pictures] = [(row["phonemes"][0][1], row["seconds"] - row["phonemes"][-1][2]) for row in rows]
    assert all(pause == pytest.approx(MARGIN, abs=0.04) for pair in pauses[False] for pause in pair)
    before, after = np.transpose(pauses[True])
    assert before.min() > PAUSES[0] - 0.04 and before.max() < PAUSES[1] + 0.04 and np.ptp(before) > 0.15
    assert np.abs(before - after).max() < 0.08


@pytest.mark.parametrize("pictures", [False, True])
def test_rumble_is_removed_from_speech_but_not_from_the_sound_of_a_video(tmp_path, spoken, pictures):
    """What a video's sound contains is in the input of A2V, too."""
    times = np.arange(len(spoken[1])) / RATE
    wave = 0.3 * spoken[1] + (0.1 * np.sin(2 * np.pi * 20 * times)).astype(np.float32)
    frames = np.zeros((len(wave) * FPS // RATE, 32, 32, 3), np.uint8)
    write_video(tmp_path / "a.mp4", frames, FPS, wave, RATE, lossless=True)
    write_voices(tmp_path / "out", {"train": [Recording("a", tmp_path / "a.mp4", "s1", TEXT)]}, None, 0, {}, pictures)
    sound = read_audio(tmp_path / "out/train/a.wav", RATE)
    power = np.abs(np.fft.rfft(sound, 4 * RATE)) ** 2
    share = power[4 * 15 : 4 * 25].sum() / power.sum()
    assert share > 0.3 if pictures else share < 0.01


def test_an_interrupted_corpus_with_texts_is_continued(tmp_path, spoken):
    for name, wave in {"a": spoken[1], "b": spoken[1], "silent": 0 * spoken[1]}.items():
        write_wav(tmp_path / f"{name}.wav", wave, RATE)
    recordings = [Recording(name, tmp_path / f"{name}.wav", "s1", TEXT, others=1) for name in ("a", "silent", "b")]
    assert write_voices(tmp_path / "out", {"train": recordings}, None, 0, {}) == {"train": 4}
    before = contents(tmp_path / "out")
    for name in ("out/train.jsonl", "out/train/b.json", "out/train/b-1.wav", "a.wav", "silent.wav"):
        (tmp_path / name).unlink()  # a and silent are there, so that they are not read again
    write_voices(tmp_path / "out", {"train": recordings}, None, 0, {})
    assert contents(tmp_path / "out") == before
    write_voices(tmp_path / "out", {"train": recordings[2:]}, None, 0, {}, seed=1)
    assert contents(tmp_path / "out")["train/b-1.wav"] != before["train/b-1.wav"]  # at another speed


@pytest.mark.parametrize(("clips", "each"), [(5, 2), (9, 3)])
def test_a_held_out_synthetic_clip_is_in_one_split(tmp_path, spoken, clips, each):
    write_wav(tmp_path / "a.wav", spoken[1], RATE)
    recordings = [Recording(f"a{number}", tmp_path / "a.wav", "s1", TEXT) for number in range(3)]
    (tmp_path / "drawn").mkdir()
    for split in ("train", "dev"):
        rows = [{"id": f"{split}_{number}", "split": split} for number in range(clips)]
        (tmp_path / "drawn" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    people = {"train": recordings[:1], "val": recordings, "test": recordings}
    counts = write_voices(tmp_path / "out", people, tmp_path / "drawn", 4, {})
    assert counts == {"train": 1 + 4, "val": 3 + each, "test": 3 + each}
    rows = {split: (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines() for split in counts}
    found = {split: [json.loads(row)["id"] for row in of_split][3:] for split, of_split in rows.items()}
    assert found["test"] == [f"dev_{number}" for number in range(each)]
    assert found["val"] == [f"dev_{number}" for number in range(each, 2 * each)]
    link = tmp_path / "out" / "val" / f"dev_{each}.wav"
    assert link.readlink() == tmp_path / "drawn" / "dev" / link.name
    (tmp_path / "drawn").rename(tmp_path / "moved")
    write_voices(tmp_path / "out", people, tmp_path / "moved", 4, {})
    assert link.readlink() == tmp_path / "moved" / "dev" / link.name


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
    assert list(grid_recordings(tmp_path, ["s1"], [])) == ["train", "val", "test"]
    every = grid_recordings(tmp_path, None, ["s31"])
    assert {row.speaker for row in every["train"]} == {row.speaker for row in found["train"]}


def test_listed_recordings_are_parts_of_files_and_get_copies_at_other_speeds(tmp_path):
    sound(tmp_path / "a.wav", 2.0)
    write_csv(tmp_path / "parts.csv", [ROW | {"text": "hello", "start": 0.5, "end": 1.5}])
    listed = listed_recordings(tmp_path / "parts.csv", others=2)
    write_corpus(tmp_path / "out", {"train": [(recording, 1) for recording in listed]}, {})
    rows = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert [row["voice"] for row in rows] == ["anna", "anna_1", "anna_2"]
    seconds = []
    for row in rows:
        wave, _ = soundfile.read(tmp_path / f"out/train/{row['id']}.wav")
        seconds.append(len(wave) / RATE)
        pitch = np.argmax(np.abs(np.fft.rfft(wave, 10 * RATE))) / 10
        assert pitch == pytest.approx(300 / seconds[-1], rel=0.02)
    assert seconds[0] == 1.0 and len(set(seconds)) == 3


@pytest.mark.parametrize("speed", [0.85, 1.18])
def test_another_speed_does_not_disturb_a_recording_that_ends_in_sound(speed):
    wave = np.cos(2 * np.pi * 300 * np.arange(RATE) / RATE).astype(np.float32)
    fast = at_speed(wave, speed)
    expected = np.cos(2 * np.pi * 300 * np.arange(len(fast)) / len(fast))
    assert len(fast) == pytest.approx(RATE / speed, rel=0.01)
    assert np.abs(fast - expected)[12:-12].max() < 1e-3  # but for half a millisecond at the ends


def test_an_interrupted_corpus_is_continued_with_the_same_speeds(tmp_path):
    for name in ("a", "b"):
        sound(tmp_path / f"{name}.wav", 1.0)
    listed = [Recording(name, tmp_path / f"{name}.wav", name, others=2) for name in ("a", "b")]
    write_corpus(tmp_path / "out", {"train": [(recording, 1) for recording in listed]}, {})
    before = {path.name: path.read_bytes() for path in (tmp_path / "out/train").iterdir()}
    (tmp_path / "a.wav").unlink()  # all of its copies are there, so that it is not read again
    (tmp_path / "out/train/b_1.wav").unlink()
    write_corpus(tmp_path / "out", {"train": [(recording, 1) for recording in listed]}, {})
    assert {path.name: path.read_bytes() for path in (tmp_path / "out/train").iterdir()} == before
    with pytest.raises(UserError, match="made with other arguments"):
        write_corpus(tmp_path / "out", {"train": [(listed[1], 1)]}, {"command": {"seed": "1"}}, seed=1)


@pytest.mark.parametrize("row", [{"path": "a.wav"}, ROW | {"path": "b.wav"}, ROW | {"start": 0, "end": 0}])
def test_a_wrong_row_of_a_list_of_recordings_is_named(tmp_path, row):
    sound(tmp_path / "a.wav", 0.5)
    write_csv(tmp_path / "parts.csv", [row])
    with pytest.raises(UserError, match=r"parts\.csv.*(a|b)\.wav"):
        listed_recordings(tmp_path / "parts.csv", others=0)


def test_texts_are_required_for_a_corpus_with_texts(tmp_path):
    sound(tmp_path / "a.wav", 0.5)
    write_csv(tmp_path / "parts.csv", [ROW])
    assert len(listed_recordings(tmp_path / "parts.csv", others=0)) == 1
    with pytest.raises(UserError, match="text"):
        listed_recordings(tmp_path / "parts.csv", others=0, texts=True)


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
