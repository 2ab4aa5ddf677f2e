"""The frame of benchmarks: limits of settings, lines as they arrive, one record with command, hardware and versions."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from benchmarks import claims
from benchmarks.claims import CLAIMS
from benchmarks.hicodit_models import LOSSES
from benchmarks.inference import random_request
from benchmarks.official_talker import official_t2av
from engine.config import compose
from engine.errors import UserError
from engine.metrics.registry import METRICS
from scripts import benchmark
from talker_t2av.request import Sampling
from tests.talker_t2av.talker_fixtures import tiny_model


@pytest.mark.parametrize("name", benchmark.NAMES)
def test_every_benchmark_fits_the_frame(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.__doc__ and callable(module.add_arguments) and callable(module.run)


def test_results_are_recorded(tmp_path, monkeypatch, capsys):
    def run(args):
        for number in args.steps:
            yield {"steps": number, "threads": torch.get_num_threads()}, f"{number} steps"

    def add_arguments(parser):
        parser.add_argument("--steps", type=int, nargs="+", default=[1])

    about = "Something measured.\n\nMore."
    module = SimpleNamespace(__doc__=about, add_arguments=add_arguments, run=run)
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


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_are_settings_of_the_recipes_and_columns_of_tables(claim):
    entry = CLAIMS[claim]
    evaluation = compose("evaluate", entry["evaluate"])
    assert evaluation.corpus or "table=grid" in entry["evaluate"]
    assert set(entry["figures"]) <= set(METRICS) and set(entry.get("losses", ())) <= set(LOSSES)
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


def test_what_was_measured_before_an_error_is_recorded(tmp_path, monkeypatch):
    def run(args):
        yield {"batch": 1}, "batch 1"
        raise UserError("measure: the process was killed")

    module = SimpleNamespace(__doc__="Something measured.", add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(benchmark, "import_module", lambda name: module)
    monkeypatch.setattr("sys.argv", ["scripts/benchmark.py", "faces", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="killed"):
        benchmark.main()
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-faces-cpu-stopped.json")
    assert json.loads(path.read_text())["results"] == [{"batch": 1}]


def test_the_baseline_of_generation_computes_on_the_device_of_the_model(monkeypatch):
    monkeypatch.setattr("talker_t2av.layers.product_type", lambda device: None)  # autocast knows no meta device
    model = tiny_model().to("meta")
    request = random_request(model, patches=2, seed=0)
    speech, motion = official_t2av(model, request, Sampling(steps=2))
    frames = 2 * model.config.patch_size
    assert speech.device.type == motion.device.type == "meta"
    assert (len(speech), len(motion)) == (frames, frames)


def test_variants_made_of_a_model_are_measured_anew_when_it_is_trained_anew(tmp_path, monkeypatch):
    claim = {"variants": {"full": {}, "other": {}, "longer": {"weights": "full"}, "derived": {"derive": "full"}}}
    for name in claim["variants"]:
        (tmp_path / f"{name}-0" / "evaluation").mkdir(parents=True)
    monkeypatch.setattr(claims, "run_program", lambda *words: None)
    args = SimpleNamespace(corpus=tmp_path, train=[], threads=1)
    claims.train(args, claim, claim["variants"]["full"], 0, tmp_path / "full-0", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full-0", "other-0"]
    assert [path.name for path in (tmp_path / "full-0").iterdir()] == ["trained.json"]
