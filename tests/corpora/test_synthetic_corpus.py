"""The synthetic corpus: deterministic, resumable, with disjoint splits and faces that show what is said."""

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile

from corpora.preparation.sources import synthetic
from corpora.synthetic import sentences
from corpora.synthetic.corpus import FRAME, ClipMaker, window_expressions
from corpora.synthetic.expression import EXPRESSIONS, pose, prosody
from corpora.synthetic.face import Face, draw_motion
from corpora.synthetic.mouth_opening import MouthReader
from corpora.synthetic.sentences import SLOTS, SPLITS, draw_sentence, split_of
from corpora.synthetic.visemes import FPS, MOUTH, mouth_track
from corpora.synthetic.voices import load_voices
from engine.media.audio import read_audio
from engine.media.video import read_video
from engine.metrics.recogniser import Recogniser
from hicodit.conditions.types import num_expression_windows
from talker_t2av.phonemes import SYMBOLS
from tests import forked
from tests.waiting import wait_until

REPO = Path(__file__).resolve().parents[2]


def make(out: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    done = forked.run("scripts/make_synthetic_corpus.py", "--out", out, *arguments)
    assert done.returncode == code, done.stderr
    return done


def digests(root: Path) -> dict[str, str]:
    files = [f for f in sorted(root.rglob("*")) if f.is_file()]
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def entries(root: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]


ARGUMENTS = {  # by version
    2: ("--seed", "3", "--clips", "16", "--test-clips", "4"),
    3: ("--seed", "3", "--clips", "8", "--test-clips", "3", "--version", "3"),
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Corpora of both versions, each made by two workers when it is first needed."""

    @functools.cache
    def made(version: int) -> Path:
        root = tmp_path_factory.mktemp("corpus") / str(version)
        make(root, *ARGUMENTS[version])
        return root

    return made


@pytest.fixture(scope="module")
def corpus(corpora) -> Path:
    return corpora(2)


def test_worker_count_changes_no_byte(corpora, tmp_path):
    make(tmp_path / "one", *ARGUMENTS[3], "--workers", "1")
    one = digests(tmp_path / "one")
    assert one == digests(corpora(3))
    assert len(one) == 20 * 2 + 5 + 3  # clips; manifests; grammars, corpus.json


def test_an_interrupted_corpus_is_finished_the_same(corpus, tmp_path):
    root = Path(shutil.copytree(corpus, tmp_path / "copy"))
    for name in ("train/train_000001.json", "seen/seen_000000.wav", "train.jsonl"):  # .json is written last
        (root / name).unlink()
    (root / "seen" / ".seen_000000-part.mp4").write_bytes(b"half a file")
    kept = (root / "train" / "train_000003.wav").stat().st_mtime_ns
    make(root, *ARGUMENTS[2], "--workers", "1")
    assert digests(root) == digests(corpus)
    assert (root / "train" / "train_000003.wav").stat().st_mtime_ns == kept


def test_another_seed_requires_another_folder(corpus):
    assert "seed 3" in make(corpus, *ARGUMENTS[2], "--seed", "4", code=2).stderr
    assert "version 2" in make(corpus, *ARGUMENTS[3], code=2).stderr and not (corpus / "plain").exists()


def test_more_voices_speak_in_training_clips_alone(corpus, tmp_path):
    voices = load_voices(more=2)
    assert voices[:460] == load_voices()
    assert [(voice.number, voice.group) for voice in voices[460:]] == [(460, "more"), (461, "more")]
    wide = ClipMaker(tmp_path, 3, 2, more=2)
    for split in SPLITS[2]:
        (tmp_path / split).mkdir()
        assert json.loads(json.dumps(wide.make(split, 1))) == entries(corpus, split)[1]
    assert [wide.make("train", i)["voice"] for i in (399, 401, 402)] == [399, 461, 0]


def test_an_interrupt_ends_all_processes_and_leaves_no_partial_files(tmp_path):
    root = tmp_path / "corpus"
    making = subprocess.Popen(
        [sys.executable, "scripts/make_synthetic_corpus.py", "--out", str(root), "--clips", "1000"],
        cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )  # fmt: skip
    try:
        wait_until(lambda: making.poll() is not None or list(root.glob("train/*.json")))
        os.killpg(making.pid, signal.SIGINT)  # as Ctrl-C does: to every process of the terminal
        assert making.communicate(timeout=60)[1].splitlines()[-1] == "interrupted"
    finally:
        if making.poll() is None:
            os.killpg(making.pid, signal.SIGKILL)
    assert making.returncode == 130
    assert not list(root.rglob(".*")) and not (root / "train.jsonl").exists()


def test_version_3_is_speech_alone_of_any_words(corpora, corpus):
    third = corpora(3)
    assert {path.suffix for path in third.glob("*/*")} == {".wav", ".json"}
    for split in SPLITS[3]:
        for entry in entries(third, split):
            assert split == "plain" or split_of(entry["text"]) == split
            assert entry["seconds"] <= 8 and "face" not in entry
    assert [entry["text"] for entry in entries(third, "plain")] == sentences.plain_sentences()[:3]
    source = synthetic(third)
    clip = source.clips("dev")[1]
    assert clip.video is None and {symbol for symbol, *_ in clip.phonemes} <= set(source.symbols) == set(SYMBOLS)
    assert synthetic(corpus, all_symbols=True).symbols == SYMBOLS != synthetic(corpus).symbols


def test_only_the_split_unseen_has_unseen_voices(corpus):
    groups = {voice.number: voice.group for voice in load_voices()}
    for split, group in (("train", "train"), ("seen", "train"), ("unseen", "unseen")):
        assert {groups[entry["voice"]] for entry in entries(corpus, split)} == {group}


@pytest.mark.parametrize("free", [False, True])
def test_large_draws_stay_in_their_split(free):
    rng = np.random.default_rng(0)
    drawn = {split: {draw_sentence(rng, split, free) for _ in range(2000)} for split in SPLITS[2]}
    assert all(split_of(text) == split for split, texts in drawn.items() for text in texts)
    assert not any(a & b for a, b in combinations(drawn.values(), 2))
    words = {word for text in drawn["train"] for word in text.split()}
    assert len(words) > 2000 if free else words == {word for slot in SLOTS for word in slot}


def test_clip_files_agree(corpus):
    for split in SPLITS[2]:
        for entry in entries(corpus, split):
            stem = corpus / split / entry["id"]
            assert json.loads(stem.with_suffix(".json").read_text()) == entry
            sound = soundfile.info(stem.with_suffix(".wav"))
            assert (sound.channels, sound.subtype, sound.samplerate) == (1, "PCM_16", 24_000)
            assert sound.frames == entry["frames"] * 960
            frames = read_video(stem.with_suffix(".mp4"), FPS)
            assert frames.shape == (entry["frames"], 128, 128, 3) and entry["frames"] == round(entry["seconds"] * FPS)
            assert all(len(values) == entry["frames"] for values in [*entry["mouth"].values(), *entry["pose"].values()])


def test_phonemes_lie_in_the_clip_and_where_the_sound_is(corpus):
    for entry in entries(corpus, "train"):
        ends = [0.0]
        for _, start, end in entry["phonemes"]:
            assert ends[-1] - 1e-6 <= start < end <= entry["seconds"]
            ends.append(end)
        samples = read_audio(corpus / "train" / f"{entry['id']}.wav", 24_000)
        first, last = (int(24000 * t) for t in (entry["phonemes"][0][1], entry["phonemes"][-1][2]))
        spoken = samples[first:last]
        silent = np.concatenate([samples[: first - 480], samples[last + 2400 :]])
        assert np.sqrt(np.mean(spoken**2)) > 10 * np.sqrt(np.mean(silent**2))


@pytest.mark.parametrize("symbol", ["p", "b", "m"])
def test_closures_close_the_mouth(symbol):
    column = MOUTH.index("open")
    for offset in np.linspace(0, 0.04, 9):  # wherever the frame grid falls
        begin = 0.4 + offset
        end = 0.45 + offset
        track = mouth_track([("A:", 0.2, begin), (symbol, begin, end), ("a", end, 0.8)], 25)
        assert track[5:20, column].max() > 0.6
        assert track[9:14, column].min() < 0.02


def test_the_mouth_opening_is_read_off_pictures_of_unseen_voices():
    phonemes = [("b", 0.15, 0.2), ("I", 0.2, 0.35), ("n", 0.35, 0.45), ("w", 0.45, 0.55), ("aI", 0.55, 0.8)]
    track = mouth_track(phonemes, 26)
    reader = MouthReader(24)
    unseen = [voice for voice in load_voices() if voice.group == "unseen"]
    for voice, expression in product(unseen[:3] + unseen[-3:], ("neutral", "happy", "sad", "disgusted")):
        motion = draw_motion(np.random.default_rng(voice.number), 26, np.linspace(0, 1, 26))
        frames = Face(voice.face).render(track, pose(expression, 0.9), motion)
        assert np.corrcoef(reader(frames), track[:, MOUTH.index("open")])[0, 1] > 0.9


def test_corpus_has_changes_free_sentences_and_a_dev_split(corpus):
    rows = [entry for split in SPLITS[2] for entry in entries(corpus, split)]
    assert {len(entries(corpus, split)) for split in SPLITS[2][1:]} == {4}
    assert {entry["grammar"] for entry in rows} == {"closed", "free"}
    assert 4 <= sum(entry["change"] is not None for entry in rows) <= len(rows) - 4
    groups = {v.number: v.group for v in load_voices()}
    assert Counter(groups[entry["voice"]] for entry in entries(corpus, "dev")) == {"train": 2, "dev": 2}
    for entry in rows:
        shown = entry["expressions"]
        change = entry["change"]
        assert len(shown) == (2 * (entry["frames"] - 1)) // 25 + 1 and set(shown) <= set(EXPRESSIONS)
        assert shown.count(entry["expression"]) * 2 >= len(shown)
        assert len(set(shown)) == 1 + (change is not None)
        assert change is None or change in [start for _, start, _ in entry["phonemes"]]


def test_a_change_is_heard_and_seen_at_once(corpus):
    changing = [e for e in entries(corpus, "train") if e["change"]]
    for entry in changing:
        first = entry["expressions"][0]
        last = entry["expressions"][-1]
        samples = read_audio(corpus / "train" / f"{entry['id']}.wav", 24_000)
        cut = int(entry["change"] * 24_000)
        begin, end = (int(24_000 * t) for t in (entry["phonemes"][0][1], entry["phonemes"][-1][2]))
        before, after = (np.sqrt(np.mean(part**2)) for part in (samples[begin:cut], samples[cut:end]))
        assert (after > before) == (prosody(last, 1.0).gain > prosody(first, 1.0).gain)
        brows = read_video(corpus / "train" / f"{entry['id']}.mp4", FPS)[:, 36:58].astype(float)
        middle = cut // FRAME
        inside = np.abs(brows[: middle - 3] - np.median(brows[: middle - 3], 0)).mean()
        across = np.abs(np.median(brows[middle + 3 :], 0) - np.median(brows[: middle - 3], 0)).mean()
        assert across > inside


def test_windows_take_the_expression_of_their_middle():
    assert window_expressions(50, "sad", "happy", 1.2) == ["sad", "sad", "happy", "happy"]
    for frames in range(1, 60):  # as many as the model and the preparation count
        assert len(window_expressions(frames, "sad", "sad", None)) == num_expression_windows(frames)


def test_free_sentences_are_understood_without_a_grammar(corpus):
    rows = [entry for entry in entries(corpus, "train") if entry["grammar"] == "free"][:6]
    waves = [read_audio(corpus / "train" / f"{entry['id']}.wav", 24_000) for entry in rows]
    recogniser = Recogniser(corpus / "free.arpa")
    texts = [entry["text"] for entry in rows]
    heard = [recogniser.transcribe(wave, 24_000) for wave in waves]
    assert jiwer.wer(texts, heard) < 0.5 < jiwer.wer(texts, heard[1:] + heard[:1])
