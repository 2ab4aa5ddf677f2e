"""Progress in plain lines where standard error is not a terminal."""

import re
from time import sleep

import numpy as np

from engine import progress
from engine.progress import progress_bar, showing, stage, watched


def test_lines_show_rate_and_remaining_time(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
    with showing() as shown:
        shown.prefix = "2/7 "
        with stage("a.mp4", 5, "frames"), stage("reading"):
            for _ in watched([np.zeros(2), np.zeros(3)]):
                sleep(0.11)  # tqdm looks at the clock ten times a second
        for _ in progress_bar("ab", 4, "clips"):
            sleep(0.11)
    text = capsys.readouterr().err
    assert "\r" not in text and "reading" not in text
    assert re.search(r"^2/7 a\.mp4: 5/5 frames, +[\d.]+ frames/s, 00:00 left$", text, re.MULTILINE)
    assert re.findall("(./4) clips,", text) == ["0/4", "1/4", "2/4"]


def test_nothing_to_do_has_no_line(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
    assert list(progress_bar((), 0, "batches")) == []
    assert capsys.readouterr().err == ""
