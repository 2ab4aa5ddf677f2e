"""The manifests of Talker-T2AV's evaluation on people."""

import json
import sys

import pytest

from engine.errors import UserError
from scripts import make_portrait_manifests

NAMES = ("bbaf2n", "bbaf3s", "lbbc1a", "lgwm5p", "pgwi9s", "prav6s")


def written(monkeypatch, grid, out, *people):
    words = ["--grid", str(grid), "--people", *people, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["make_portrait_manifests.py", *words])
    make_portrait_manifests.main()
    return [[json.loads(line) for line in (out / f"{name}.jsonl").open()] for name in ("sentences", "clips")]


def test_no_clip_is_its_own_reference_and_names_that_are_not_grids_are_skipped(tmp_path, monkeypatch):
    for person in ("s31", "s32"):
        (tmp_path / person).mkdir()
        for name in (*NAMES, "aaa-portrait"):
            (tmp_path / person / f"{name}.mpg").touch()
    sentences, clips = written(monkeypatch, tmp_path, tmp_path / "out", "s31", "s32")
    assert len(sentences) == 60 and [row["speaker"] for row in sentences[:3]] == ["s31", "s32", "s31"]
    assert len({row["reference_audio"] for row in sentences}) == 2 * len(NAMES)
    assert [row["id"] for row in clips] == [f"{person}-{name}" for person in ("s31", "s32") for name in NAMES]
    assert clips[2]["text"] == "lay blue by c one again"
    for row in sentences + clips:
        assert row["reference"] != row["reference_audio"]
        assert row["speaker"] in row["reference"] and row["speaker"] in row["reference_audio"]


def test_a_person_with_too_few_clips_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "s31").mkdir()
    (tmp_path / "s31" / "bbaf2n.mp4").touch()
    with pytest.raises(UserError, match="s31 has 1 clips"):
        written(monkeypatch, tmp_path, tmp_path / "out", "s31")
    assert not (tmp_path / "out").exists()
