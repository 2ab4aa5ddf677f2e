"""Progress in plain lines where standard error is not a terminal."""

import re
from time import sleep

import numpy as np

from engine import progress
from engine.progress import showing, stage, track, watched


def test_lines_show_rate_and_remaining_time(capsys, monkeypatch):
    with showing() as shown:
        shown.prefix = "2/7 "
        for seconds in (-1.0, 10.0):
            monkeypatch.setattr(progress, "LINE_EVERY", seconds)
            with stage("a.mp4 (0.2 s): finding the face", 5, "frames"), stage("reading"):
                for _ in watched([np.zeros(2), np.zeros(3)]):
                    sleep(0.11)  # tqdm looks at the clock ten times a second
            for _ in track("ab", 4, "clips"):
                sleep(0.11)
    text = capsys.readouterr().err
    assert "\r" not in text and "reading" not in text
    faces, clips = (re.findall(f"^.*{unit}/s.*$", text, re.MULTILINE) for unit in ("frames", "clips"))
    assert re.fullmatch(r"2/7 a\.mp4 \(0\.2 s\): finding the face: 5/5 frames, +[\d.]+ frames/s, 00:00 left", faces[-1])
    assert [line.split(",")[0] for line in clips] == ["0/4 clips", "1/4 clips", "2/4 clips"]
    assert re.fullmatch(r"2/4 clips, +[\d.]+ clips/s, 00:00 left", clips[-1])


def test_nothing_to_do_has_no_line(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
    assert list(track((), 0, "batches")) == []
    assert capsys.readouterr().err == ""
