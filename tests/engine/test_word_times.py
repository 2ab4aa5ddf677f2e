"""Word timestamps against those of espeak-ng, and their files."""

import json
from itertools import pairwise

import numpy as np

from corpora.synthetic.voices import load_voices
from engine.word_times import Word, WordTimes, cues
from tests.spoken import speak

TEXTS = [
    "set blue by hotel four now",
    "Before tonight, they purchased this sweet melon.",
    "seven zebroids wandered blorfing",  # two of which no dictionary has
]


def test_the_median_error_of_word_timestamps_is_below_60_ms():
    sayings = [(text, voice.lines) for voice in load_voices()[:4] for text in TEXTS]
    times = WordTimes()
    errors = []
    for (text, _), utterance in zip(sayings, speak(sayings)):
        words = times.align(text, utterance.wave, utterance.rate)
        assert [word.text for word in words] == text.split()
        begins = [utterance.phonemes[first][1] for first in utterance.words]
        assert all(a.end <= b.begin + 1e-6 for a, b in pairwise(words))
        errors += [abs(word.begin - begin) for word, begin in zip(words, begins) if len(words) == len(begins)]
    assert len(errors) > 40 and np.median(errors) < 0.06


def test_silence_has_no_words():
    assert WordTimes().align("set blue", np.zeros(100), 16_000) == []
    assert WordTimes().align(" ... ", np.zeros(16_000), 16_000) == []
    assert WordTimes().recognise(np.zeros(16_000), 16_000) == []


def test_a_subtitle_has_at_most_seven_words_and_no_pause():
    nine = [Word("word", i / 4, (i + 1) / 4) for i in range(9)]
    assert [len(cue.text.split()) for cue in cues(nine)] == [7, 2]
    apart = [Word("one", 0.0, 0.3), Word("two", 1.0, 1.3)]
    assert [cue.text for cue in cues(apart)] == ["one", "two"]


def test_words_are_written_as_json_and_subtitles(tmp_path):
    words = [Word("Set", 0.1, 0.3), Word("blue.", 0.3, 0.75), Word("Now", 3661.5, 3662.0)]
    lines = [(cue.text, cue.begin, cue.end) for cue in cues(words)]
    assert lines == [("Set blue.", 0.1, 0.75), ("Now", 3661.5, 3662.0)]
    WordTimes.write(tmp_path / "talk.one", words, "text")
    written, srt, vtt = ((tmp_path / f"talk.one.{suffix}").read_text() for suffix in ("json", "srt", "vtt"))
    assert json.loads(written)["words"][1] == {"text": "blue.", "begin": 0.3, "end": 0.75}
    assert srt == "1\n00:00:00,100 --> 00:00:00,750\nSet blue.\n\n2\n01:01:01,500 --> 01:01:02,000\nNow\n"
    assert vtt.startswith("WEBVTT\n\n00:00:00.100 --> 00:00:00.750\nSet blue.\n\n01:01")
