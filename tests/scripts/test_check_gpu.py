"""scripts/check_gpu.py on a CPU: all checks run, and a failing one does not end the others."""

import json

import pytest
import torch

from benchmarks import collectives, gpu_checks
from benchmarks.gpu_checks import Machine, Rates, judge
from engine.errors import exit_process
from engine.training import distributed
from scripts import check_gpu
from tests.forked import run_group
from tests.gpu.dying_graphs import DyingOutputs

TESTED = "def test_one():\n    pass\n"


class Processor(Machine):
    """A CPU in place of a card. What it measures is far from what a card would, so verdicts mean nothing."""

    name = "NVIDIA H100 80GB HBM3"
    rates = Rates(650e12, 50e12, 2.8e12)

    def __init__(self, tests):
        super().__init__(torch.device("cpu"), 1, "tiny")
        self.tests = tests
        self.backend = DyingOutputs()
        tests.mkdir()
        (tests / "test_card.py").write_text(TESTED)

    def versions(self):
        return 13.0, 12.8

    def bandwidths(self):
        return {"all-reduce": 1.0, "all-gather": 1.0}

    def time(self, call, repeats=1):
        return super().time(call, 1)

    def in_process(self, measure, *arguments):
        return measure(*arguments)


def run_checks(machine, tmp_path, monkeypatch, *only):
    """Run the command; return its exit code and the lines of its record by name."""
    words = ["--size", "tiny", "--out", str(tmp_path / "out"), *(("--only", *only) if only else ())]
    monkeypatch.setattr("sys.argv", ["scripts/check_gpu.py", *words])
    code = check_gpu.main(machine)
    (path,) = (tmp_path / "out").glob("20*.json")
    record = json.loads(path.read_text())
    return code, {line["name"]: line for line in record["results"]}


@pytest.mark.slow
def test_all_checks_run(tmp_path, monkeypatch):
    _, lines = run_checks(Processor(tmp_path / "tests"), tmp_path, monkeypatch)
    assert {"driver", "graphs hicodit", "graphs talker_t2av", "posteriors bf16", "service 1 clients"} <= set(lines)
    errors = [name for name, line in lines.items() if name != "flash-attn" and "Error" in line["note"]]
    assert not errors, [lines[name]["note"] for name in errors]
    exact = ("graphs hicodit", "graphs talker_t2av", "posteriors bf16")  # what does not depend on speed
    assert [lines[name]["verdict"] for name in exact] == ["PASS"] * 3


def test_a_check_that_raises_is_a_failure_and_the_others_run(tmp_path, monkeypatch):
    def broken(size):
        raise RuntimeError("CUDA error:\nan illegal memory access")

    monkeypatch.setattr(gpu_checks, "build_hicodit", broken)
    code, lines = run_checks(Processor(tmp_path / "tests"), tmp_path, monkeypatch, "hicodit", "talker_t2av")
    assert code == 1 and lines["hicodit"]["verdict"] == "FAIL"
    assert lines["hicodit"]["note"] == "RuntimeError: CUDA error: an illegal memory access"
    assert "talker_t2av memory" in lines


def test_a_value_far_out_of_its_range_fails_and_one_nearby_warns():
    assert [judge(value, 1, 3) for value in (1, 0.6, 5, 7, float("nan"))] == ["PASS", "WARN", "WARN", "FAIL", "FAIL"]
    assert judge(7, 1, None) == "PASS"


def exchange(folder):
    found = collectives.bandwidths(distributed.init("cpu"), 2**20, 2)
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(found))
    exit_process(0)


def test_collectives_are_measured_on_all_ranks(tmp_path):
    run_group(tmp_path, 2, exchange, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and [*first] == ["all-reduce", "all-gather", "reduce-scatter"]
    assert all(1e5 < rate < 1e12 for rate in first.values())
