"""The frame of benchmarks: limits of settings, lines as they arrive, one record with command, hardware and versions;
and intervals over the seeds of claims.
"""

import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from benchmarks import serving
from benchmarks.claims import CLAIMS
from benchmarks.comparison import estimate
from benchmarks.hicodit_models import LOSSES
from benchmarks.reenactment import clips_of
from engine.config import compose
from engine.errors import UserError
from engine.evaluation.statistics import ratio
from engine.metrics.registry import FIGURES
from scripts import benchmark


@pytest.mark.parametrize("name", benchmark.NAMES)
def test_every_benchmark_fits_the_frame(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.__doc__ and callable(module.add_arguments) and callable(module.run)


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Runs a benchmark of some numbers of steps, which stops after three of them."""

    def run(args):
        for number in args.steps[:3]:
            yield {"steps": number, "threads": torch.get_num_threads()}, f"{number} steps"
        if len(args.steps) > 3:
            raise UserError("measure: the process was killed")

    def add_arguments(parser):
        parser.add_argument("--steps", type=int, nargs="+")

    module = SimpleNamespace(__doc__="Something measured.\n\nMore.", add_arguments=add_arguments, run=run)
    monkeypatch.setattr(benchmark, "import_module", lambda name: module)

    def call(*steps):
        words = ["--device", "cpu", "--threads", "1", "--out", str(tmp_path), "--steps", *map(str, steps)]
        monkeypatch.setattr("sys.argv", ["scripts/benchmark.py", "faces", *words])
        benchmark.main()

    return call


def test_results_are_recorded(measure, tmp_path, capsys):
    measure(2, 3)
    (path,) = tmp_path.glob("*-faces-cpu.json")
    assert capsys.readouterr().out == f"2 steps\n3 steps\n{path}\n"
    record = json.loads(path.read_text())
    assert record["what"] == "Something measured." and record["arguments"]["steps"] == "[2, 3]"
    assert record["command"].startswith("python scripts/benchmark.py faces") and str(tmp_path) not in path.read_text()
    assert record["hardware"]["threads"] == 1 and record["versions"]["torch"] == torch.__version__
    assert record["results"] == [{"steps": 2, "threads": 1}, {"steps": 3, "threads": 1}]


def test_a_benchmark_of_the_processor_has_no_other_device(monkeypatch):
    for name in ("faces", "lags"):
        monkeypatch.setattr("sys.argv", ["scripts/benchmark.py", name, "--device", "cuda"])
        with pytest.raises(UserError, match="--device"):
            benchmark.main()


def test_what_was_measured_before_an_error_is_recorded(measure, tmp_path):
    with pytest.raises(UserError, match="killed"):
        measure(1, 2, 3, 4)
    (path,) = tmp_path.glob("*-faces-cpu-stopped.json")
    assert [row["steps"] for row in json.loads(path.read_text())["results"]] == [1, 2, 3]


DYING_SERVER = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    answers = 0

    def do_GET(self):
        self.answer(b'{"requests": 0}')

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        Handler.answers += 1
        if Handler.answers > 6:  # four to warm up, and those of the first load
            os._exit(3)
        self.answer(b"sound")

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def test_loads_before_the_server_died_are_recorded(tmp_path, monkeypatch):
    """Also the load during which it died: its requests are lost."""
    pytest.importorskip("httpx")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "serve.py").write_text(DYING_SERVER)
    monkeypatch.setattr(serving, "CHECKOUT", tmp_path)
    words = ["--clients", "1", "2", "4", "--requests", "2", "--mixed", "0"]
    monkeypatch.setattr("sys.argv", ["scripts/benchmark.py", "serving", "--out", str(tmp_path), *words])
    with pytest.raises(UserError, match="the server ended with exit code 3"):
        benchmark.main()
    (path,) = tmp_path.glob("*-serving-*-stopped.json")
    first, second = json.loads(path.read_text())["results"]
    assert first["answers"] == {"speech: as it should": 2} and first["left_inside"] == 0
    assert sum(second["answers"].values()) == 2 and all(answer.startswith("lost") for answer in second["answers"])
    assert second["left_inside"] is None


def test_clips_of_people_are_found_as_grid_unpacks_them(tmp_path):
    """Files .mpg, perhaps in folders below the speaker's, evenly spaced by name."""
    folder = tmp_path / "s31" / "video" / "mpg_6000"
    folder.mkdir(parents=True)
    for name in ("bbaf2n", "lbbc1a", "pgwi9s", "sgaf4p"):
        (folder / f"{name}.mpg").touch()
    assert [path.name for path in clips_of(tmp_path / "s31", 2)] == ["bbaf2n.mpg", "pgwi9s.mpg"]
    assert [path.parent for path in clips_of(tmp_path / "s31", 9)] == [folder] * 4
    (tmp_path / "s32").mkdir()
    with pytest.raises(UserError, match="s32 contains no"):
        clips_of(tmp_path / "s32", 2)


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_are_settings_of_the_recipes_and_columns_of_tables(claim):
    entry = CLAIMS[claim]
    evaluation = compose("evaluate", entry["evaluate"])
    assert evaluation.corpus or "table=grid" in entry["evaluate"]
    assert set(entry["figures"]) <= set(FIGURES) and set(entry.get("losses", ())) <= set(LOSSES)
    plain = compose("train", entry["train"]) if "train" in entry else None
    for name, variant in entry["variants"].items():
        assert set(variant) <= {"train", "derive", "weights", "generate", "model"}
        assert variant.get("weights", name) in entry["variants"]
        if "train" in variant:
            config = compose("train", [*entry["train"], *variant["train"]])
            assert OmegaConf.to_yaml(config) != OmegaConf.to_yaml(plain), name
            if claim == "orders":
                rows = [c.trainer.batch_size * len(c.data.train.tasks) for c in (config, plain)]
                assert rows[0] == rows[1], name


def pairs(values):
    return np.stack([values, np.ones(np.shape(values))], -1)


SPEAKERS = [str(i // 2) for i in range(40)]


def test_the_interval_over_seeds_and_clips_covers_the_true_mean():
    """Voices and seeds both vary; an interval over clips alone holds it in 60 of 100."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(60):
        voices = rng.normal(size=20).repeat(2)
        seeds = rng.normal(size=(3, 1)) * 0.5
        mean, half = estimate(ratio, pairs(5 + voices + seeds + 0.1 * rng.normal(size=(3, 40))), SPEAKERS)
        inside += abs(mean - 5) < half
    assert inside >= 54


def test_a_paired_difference_cancels_shared_variance():
    one = pairs(np.random.default_rng(2).normal(size=(3, 40)) * 10)
    two = one + [0.5, 0.0]
    two[:, 7] = np.nan  # a clip that does not count
    mean, half = estimate(ratio, two, SPEAKERS, minus=one)
    assert mean == pytest.approx(0.5) and half < 1e-9
    assert estimate(ratio, one, SPEAKERS)[1] > 1
    assert np.isnan(estimate(ratio, one, ["0"] * 40)[0])
