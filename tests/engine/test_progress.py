"""Stages are clocked one at a time, and long work says how far it is."""

import re

import numpy as np
import pytest

from engine import progress
from engine.progress import Progress, stage, track, watched


def test_the_seconds_of_stages_do_not_overlap(monkeypatch):
    now = 10.0

    def work(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    with Progress(8.0) as shown:
        with stage("outer"):
            work(0.05)
            with stage("inner"):
                work(0.1)
            work(0.05)
        work(0.5)
        with stage("inner"):
            work(0.05)
        assert shown.charge() == pytest.approx(2.75)
    assert shown.seconds == pytest.approx({"loading": 2.0, "outer": 0.1, "inner": 0.15, "other": 0.5})


def test_without_a_progress_nothing_is_said(capsys):
    with stage("sampling", 3, "steps") as step:
        step()
    assert len(list(watched([np.zeros(2)]))) == 1
    assert capsys.readouterr() == ("", "")


def test_lines_have_rate_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)  # seconds: a line after each step
    monkeypatch.setattr(progress, "LEAST", -1.0)
    with Progress() as shown:
        shown.prefix = "2/7 "
        with stage("faces", 5, "frames", "a.mp4 (0.2 s): finding the face"):
            assert len(list(watched([np.zeros(2), np.zeros(3)]))) == 2
    list(track("ab", 4, "clips"))
    faces, all_faces, one, *_, end = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"2/7 a\.mp4 \(0\.2 s\): finding the face: 2/5 frames, [\d.]+ frames/s, 0:00:00 left", faces)
    assert re.fullmatch(r"2/7 a\.mp4 \(0\.2 s\): finding the face: 5 frames, [\d.]+ frames/s, after 0:00:00", all_faces)
    assert re.fullmatch(r"1/4 clips, [\d.]+ clips/s, 0:00:00 left", one)
    assert re.fullmatch(r"2/4 clips, [\d.]+ clips/s, 0:00:00 left", end)
