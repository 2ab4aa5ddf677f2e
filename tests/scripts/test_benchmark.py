"""The frame of benchmarks: limits of settings, lines as they come, one record with command, hardware and versions."""

import csv
import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn_faces import talking_head

from benchmarks import faces, finetune, grid, prosody
from corpora.preparation.sources_studio import GRID
from engine.evaluation.charts import chart_curves
from engine.media.audio import read_audio
from engine.media.ffmpeg import probe
from engine.media.video import read_video, write_video
from engine.metrics.recogniser import Recogniser
from scripts import benchmark


@pytest.mark.parametrize("name", benchmark.NAMES)
def test_every_benchmark_fits_the_frame(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.__doc__ and callable(module.add_arguments) and callable(module.run)
    assert min(module.LEAST.values(), default=0) >= 0


def test_results_are_recorded(tmp_path, monkeypatch, capsys):
    def run(args):
        for number in args.steps:
            yield {"steps": number, "threads": torch.get_num_threads()}, f"{number} steps"

    def add_arguments(parser):
        parser.add_argument("--steps", type=int, nargs="+", default=[1])

    about = "Something measured.\n\nMore."
    module = SimpleNamespace(__doc__=about, LEAST={"steps": 1}, add_arguments=add_arguments, run=run)
    monkeypatch.setattr(benchmark, "import_module", lambda name: module)
    arguments = ["faces", "--device", "cpu", "--threads", "1", "--out", str(tmp_path), "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["scripts/benchmark.py", *arguments, "3"])
    benchmark.main()
    (path,) = tmp_path.glob("*-faces-cpu.json")
    assert capsys.readouterr().out == f"2 steps\n3 steps\n{path}\n"
    record = json.loads(path.read_text())
    assert record["what"] == "Something measured." and record["arguments"]["steps"] == "[2, 3]"
    assert record["command"].startswith("python scripts/benchmark.py faces") and str(tmp_path) not in path.read_text()
    assert record["hardware"]["threads"] == 1 and record["versions"]["torch"] == torch.__version__
    assert record["results"] == [{"steps": 2, "threads": 1}, {"steps": 3, "threads": 1}]


@pytest.mark.parametrize(("part", "side"), [("track", 0), ("tiny", 48), ("released", 96)])
def test_memory_of_faces_is_that_of_the_crops_an_encoder_takes(part, side, tmp_path):
    write_video(tmp_path / "head.mp4", talking_head(10), 25)
    found = faces.measure(str(tmp_path / "head.mp4"), part)
    assert found["frames"] == 10 and found["peak_mb"] >= found["before_mb"] > 0
    pictures = {"track": 0, "tiny": 10 * 64 * 64 * 3, "released": 2 * 224 * 224 * 3}[part]
    assert found["crops_mb"] == (10 * side * side + pictures) / 2**20


def test_stand_in_has_the_files_of_grid(tmp_path):
    pytest.importorskip("pocketsphinx")
    grammar, root = grid.write_grammar(tmp_path), tmp_path / "grid"
    grid.render(root, grammar, SimpleNamespace(speakers=3, clips=1, test_clips=1))
    source = GRID(root, protocol="unseen")
    assert {split: len(source.clips(split)) for split in ("train", "val", "test")} == {"train": 3, "val": 1, "test": 2}
    clip = source.clips("train")[0]
    assert [word for word, *_ in clip.phonemes if word != "sil"] == clip.text.split()
    frames = read_video(root / clip.video, 25)
    assert probe(root / clip.video).video == "mpeg1video" and frames.shape[1:] == (288, 360, 3)
    assert clip.phonemes[-1][2] == pytest.approx(len(frames) / 25, abs=0.1)
    assert Recogniser(grammar).transcribe(read_audio(root / clip.video, 16_000), 16_000) == clip.text


def test_footage_of_one_person_goes_on_where_it_stopped(tmp_path):
    args = SimpleNamespace(person=3, clips=2, val_clips=1, test_clips=1)
    seconds = finetune.film(tmp_path, args)
    with (tmp_path / "clips.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train", "train", "val", "test"]
    assert len({row["text"] for row in rows}) == 4
    clips = {path: path.stat().st_mtime_ns for path in (tmp_path / "unseen").iterdir()}
    numbers = {int(path.stem.rpartition("_")[2]) for path in clips}
    assert {number % finetune.VOICES for number in numbers} == {3}
    (test,) = (json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines())
    assert f"unseen/{test['id']}.mp4" == rows[3]["path"] and test["text"] == rows[3]["text"]
    assert test["reference_video"] in [row["path"] for row in rows[:2]]  # the prompt is a clip of the training
    assert finetune.film(tmp_path, args) == seconds > 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "unseen").iterdir()} == clips


def test_prosody_is_predicted_from_other_clips_alone():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 5))
    values = features @ rng.normal(size=5) + rng.normal(size=200) * 0.1
    assert np.corrcoef(values, prosody.predict(features, values))[0, 1] > 0.98
    luck = rng.normal(size=200)  # a fit to the clips themselves would correlate by 0.16 on average
    assert np.corrcoef(luck, prosody.predict(features, luck))[0, 1] < 0.1


def test_a_figure_that_no_clip_has_leaves_its_panel_empty(tmp_path):
    none, rows = [float("nan")] * 2, []
    for steps in (4, 8):
        rows.append({"variant": f"euler_{steps}", "evaluations": [steps, 0], "wer": [1 / steps, 0.1], "wer_free": none})
    rows.append({"variant": "true speech", "wer": [0.02, 0.01], "wer_free": [0.2, 0.1]})
    chart_curves(rows, ["wer", "wer_free"], "evaluations", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
