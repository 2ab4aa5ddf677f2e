"""The README's promises that can be checked cheaply."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

from engine.errors import UserError
from engine.media.ffmpeg import probe
from engine.record import portable

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_first_block_runs_the_main_job_and_the_second_the_tests():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert "infer.py" in blocks[0] and blocks[0].count("\n") == 1
    assert "setup_and_test.sh" in blocks[1] and blocks[1].count("\n") == 1
    assert "scripts/setup_and_test.sh" in (ROOT / ".ci" / "run").read_text()


def test_its_python_lines_run_as_printed(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    known = {}
    exec(compile(code, "README.md", "exec"), known)
    assert soundfile.info("speech.wav").frames == len(known["speech"].wave)
    made = probe("talk.mp4")
    assert made.video == "h264" and made.audio == "aac"
    assert sum(map(int, capsys.readouterr().out.split())) > 12_000

    known["talk"].save("talk.wav")
    assert soundfile.info("talk.wav").frames == len(known["talk"].wave)
    for result, name, why in (
        (known["speech"], "speech.mp3", r"must end in \.wav"),
        (known["speech"], "no/speech.wav", "there is no folder no"),
        (known["talk"], "talk.gif", r"must end in \.mp4"),
        (replace(known["talk"], frames=None), "tts.mp4", "no pictures"),
    ):
        with pytest.raises(UserError, match=why):
            result.save(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["assets", "speech.wav", "talk.mp4", "talk.wav"]


def test_every_file_that_it_names_is_there():
    named = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README) + re.findall(
        r"`((?:scripts|hicodit|configs)/[\w/]+\.\w+)`", README
    )
    assert named
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing


def test_records_name_no_folder_of_the_machine_that_measured():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        record = json.loads(path.read_text())
        assert record == portable(record), path
        assert not re.search(r"[\"'=\[]/(?!/)\w", path.read_text()), path
    assert portable({"a": ["x=/home/me/corpus y", "/a/b", "['/a/b/c', d/e]"], "url": "https://host/b"}) == {
        "a": ["x=corpus y", "b", "['c', d/e]"],
        "url": "https://host/b",
    }
    assert portable({"a": [math.nan, -math.inf, 0.5]}) == {"a": [None, None, 0.5]}


def test_no_placeholder_is_left():
    assert not re.findall(r"@[A-Z]+@", README)
