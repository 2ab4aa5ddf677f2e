"""Files, values and code of README.md and docs/; tests/rehearsal runs their commands."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

from engine.config import load
from engine.errors import UserError
from engine.media.ffmpeg import probe
from engine.record import portable

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"
FOLDERS = "engine|hicodit|talker_t2av|corpora|configs|scripts|service|tests|benchmarks"


def test_the_python_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    known = {}
    exec(compile(code, "README.md", "exec"), known)
    assert soundfile.info("speech.wav").frames == len(known["speech"].wave)
    made = probe("talk.mp4")
    assert made.video == "h264" and made.audio == "aac"
    assert sum(map(int, capsys.readouterr().out.split())) > 12_000
    with pytest.raises(UserError, match="must end in"):
        known["speech"].save("speech.mp3")
    with pytest.raises(UserError, match="no frames"):
        replace(known["talk"], frames=None).save("tts.mp4")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_named_by_a_page_exist(page):
    text = page.read_text()
    lines = text.splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    files = re.findall(rf"`((?:{FOLDERS})/[\w/-]+(?:\.\w+)*)", text)
    assert [name for name in files if not (ROOT / name).exists()] == []
    records = re.findall(r"`(20\d\d-[\w.-]+\.json)`", text)
    assert [name for name in records if not (RESULTS / name).exists()] == []


def test_the_recipe_of_the_page_about_extending_composes(tmp_path, monkeypatch):
    (recipe,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "experiment" / "hicodit_footage.yaml").write_text(recipe)
    monkeypatch.setattr("engine.config.CONFIGS", tmp_path / "configs")
    config = load("train", ["experiment=hicodit_footage", "data.footage=clips"])
    assert config.init == "assets/hicodit_grid" and config.data.train.source == "clips/shards/train"
    assert "stages.crops.encoders.kind=tiny" in config.data.make.shards


def value_of(record: str, where: str):
    """Return a value of a record: keys by dots, or of a list the row that has the values of `key=value`."""
    value = json.loads((RESULTS / record).read_text())["results"]
    for part in where.split("/"):
        if isinstance(value, list):
            wanted = dict(pair.split("=") for pair in part.split(","))
            (value,) = [row for row in value if all(str(row.get(k)) == v for k, v in wanted.items())]
        else:
            value = value[part]
    return value


SPEED = "size={},batch=1,seconds={},sampler={},precision={}/rtf"
README_VALUES = {  # in the order of the first bullets: as printed, the record, and the place in it
    "7.3 %": ("2026-11-26-hicodit_grid-test.json", "hicodit/wer/value"),
    "0.7 %": ("2026-11-26-hicodit_grid-test.json", "true speech/wer/value"),
    "WER 41 %": ("2026-11-26-hicodit_grid-new-grammar.json", "hicodit/wer/value"),
    "WER 1.9 %": ("2026-11-26-hicodit-seen.json", "hicodit/wer/value"),
    "26 %": ("2026-11-26-hicodit-seen.json", "hicodit/wer_free/value"),
    "WER 27 %": ("2026-11-27-talker_t2av_real-drawn-seen.json", "t2av/wer_free/value"),
    "23 %": ("2026-11-27-talker_t2av_real-drawn-seen.json", "true speech/wer_free/value"),
    "RTF 0.10": ("2026-11-23-inference-cpu.json", "model=hicodit," + SPEED.format("tiny", 10.0, "fast", "bf16")),
    "RTF 0.28": ("2026-11-26-inference-talker-tiny-cpu.json", SPEED.format("tiny", 0.64, "10 steps", "bf16")),
    "RTF 0.69": (
        "2026-11-24-inference-talker-int8-two-threads-cpu.json",
        SPEED.format("base", 4.0, "4 steps", "int8"),
    ),
}


def test_every_measured_value_of_the_readme_has_a_record():
    begin = README[: README.index("```bash")]
    printed = re.findall(r"(?:WER )?[\d.]+ %|RTF [\d.]+", begin)
    assert printed == [*README_VALUES]
    for text, (record, where) in README_VALUES.items():
        (number,) = re.findall(r"[\d.]+", text)
        decimals = len(number.partition(".")[2])
        assert f"{value_of(record, where):.{decimals}f}" == number, (text, record, where)


def test_every_record_is_named_by_a_page():
    pages = " ".join(path.read_text() for path in PAGES)
    named = tuple(re.findall(r"-[\w.-]+\.(?:json|png)", pages))
    assert [path.name for path in RESULTS.iterdir() if not path.name.endswith(named)] == []


def test_records_contain_no_paths_of_the_machine():
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        assert record == portable(record), path
        assert not re.search(r"[\"'=\[]/(?!/)\w", path.read_text()), path
    assert portable(["x=/home/me/corpus y", "['/a/b/c', d/e]", "https://host/b", "{a: 1, b:/c/d}"]) == [
        "x=corpus y",
        "['c', d/e]",
        "https://host/b",
        "{a: 1, b:d}",
    ]
    assert portable([math.nan, -math.inf, 0.5]) == [None, None, 0.5]
