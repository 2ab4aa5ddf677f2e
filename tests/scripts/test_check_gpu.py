"""scripts/check_gpu.py on a processor that gives readings of a card: all lines pass, and a wrong one does not."""

import json

import pytest
import torch

from benchmarks import card, collectives
from benchmarks.card import Machine, Rates, judge
from engine.errors import exit_process
from engine.training import distributed
from scripts import check_gpu
from tests import forked
from tests.gpu.dying_graphs import DyingOutputs

READINGS = {
    "hicodit seconds": 0.01, "hicodit first sound seconds": 0.01, "hicodit MiB": 200,
    "talker seconds": 0.01, "talker first sound seconds": 0.004, "talker MiB": 200,
    "clip t2av seconds": 0.3, "clip t2av with codecs seconds": 0.6,
    "clip a2v seconds": 0.3, "clip a2v with codecs seconds": 0.6,
    "hicodit_paper step seconds": 0.011, "hicodit_paper GiB": 0.13,
    "talker_paper step seconds": 0.011, "talker_paper GiB": 0.13,
    "all-reduce bytes/s": 400e9, "all-gather bytes/s": 350e9,
    "service 1 clients": 9, "service 4 clients": 20, "service 16 clients": 40,
}  # fmt: skip
TESTED = "def test_one():\n    pass\n"


class Processor(Machine):
    """A processor whose readings are those of an H100: the checks run, `readings` are put in for what they measured."""

    name = "NVIDIA H100 80GB HBM3"
    rates = Rates(650e12, 50e12, 2.8e12)

    def __init__(self, tests, cards=1, **readings):
        super().__init__(torch.device("cpu"), cards, "tiny")
        self.tests = tests
        self.readings = readings
        self.backend = DyingOutputs()
        tests.mkdir()
        (tests / "test_card.py").write_text(TESTED)

    def versions(self):
        return 13.0, 12.8

    def bandwidths(self):
        return {"all-reduce": 1.0, "all-gather": 1.0}

    def time(self, name, call, repeats=1):
        return super().time(name, call, 1)

    def reading(self, name, measured):
        assert measured > 0
        return (READINGS | self.readings)[name]

    def in_process(self, measure, *arguments):
        return measure(*arguments)


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Run the command; return its exit code, its lines by name, and the record."""

    def run(machine, *only):
        words = ["--size", "tiny", "--out", str(tmp_path / "out"), *(("--only", *only) if only else ())]
        monkeypatch.setattr("sys.argv", ["scripts/check_gpu.py", *words])
        code = check_gpu.main(machine)
        printed = capsys.readouterr().out
        (path,) = (tmp_path / "out").glob("20*.json")
        record = json.loads(path.read_text())
        lines = {line["name"]: line for line in record["results"]}
        assert len(lines) == len(record["results"])
        assert all(f"{line['verdict']}  {name}" in printed for name, line in lines.items())
        print(printed)  # pytest shows it with a failure
        return code, lines, record

    return run


def not_passed(lines):
    """Verdicts of lines other than PASS; flash-attn is installed nowhere here."""
    return {name: line["verdict"] for name, line in lines.items() if line["verdict"] != "PASS" and name != "flash-attn"}


def test_a_card_that_is_right_passes_all_checks(check, tmp_path):
    code, lines, record = check(Processor(tmp_path / "tests"))
    assert not_passed(lines) == {} and code == 0
    assert len(lines) == 26
    assert lines["clip a2v, without codecs"]["value"] == pytest.approx(12 / 0.3)  # frames a second
    assert record["card"] == Processor.name and record["results"][0]["name"] == "driver"
    assert all(line["note"] for line in record["results"])
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == f"{record['date']}-check-gpu-nvidia-h100-80gb-hbm3.json"


def test_a_wrong_value_and_an_error_fail(check, tmp_path, monkeypatch):
    def broken(size):
        raise RuntimeError("CUDA error:\nan illegal memory access")

    monkeypatch.setattr(card, "build_hicodit", broken)
    machine = Processor(tmp_path / "tests", **{"talker seconds": 0.5, "talker MiB": 2000})
    code, lines, _ = check(machine, "hicodit", "talker")
    assert code == 1
    assert not_passed(lines) == {"hicodit": "FAIL", "talker real-time factor": "FAIL", "talker memory": "WARN"}
    assert lines["hicodit"]["note"] == "RuntimeError: CUDA error: an illegal memory access"


def test_eight_cards_exchange_at_the_rate_of_their_links(check, tmp_path):
    code, lines, _ = check(Processor(tmp_path / "tests", cards=8, **{"all-gather bytes/s": 30e9}), "collectives")
    assert code == 1 and lines["all-reduce"]["verdict"] == "PASS"  # 400 of 450 GB/s
    assert lines["all-gather"]["verdict"] == "FAIL"  # as over PCIe


def exchange(folder):
    found = collectives.bandwidths(distributed.init("cpu"), 2**20, 2)
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(found))
    exit_process(0)


def test_collectives_are_measured_on_all_ranks(tmp_path):
    started = forked.start_group([tmp_path / "0.txt", tmp_path / "1.txt"], exchange, tmp_path)
    for process in started:
        process.join(forked.SECONDS)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and [*first] == ["all-reduce", "all-gather", "reduce-scatter"]
    assert all(1e5 < rate < 1e12 for rate in first.values())


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (1, 1, 3, "PASS"), (0.6, 1, 3, "WARN"), (0.4, 1, 3, "FAIL"), (5, 1, 3, "WARN"), (7, 1, 3, "FAIL"),
        (7, 1, None, "PASS"), (0, 1, None, "FAIL"), (0, 0, 0, "PASS"), (1, 0, 0, "FAIL"), (float("nan"), 0, 1, "FAIL"),
    ],
)  # fmt: skip
def test_a_verdict_follows_the_range_of_its_value(value, low, high, verdict):
    assert judge(value, low, high) == verdict


def test_a_driver_that_is_too_old_is_a_line(monkeypatch, capsys, tmp_path):
    def too_old(device):
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "get_device_name", too_old)
    monkeypatch.setattr("sys.argv", ["check_gpu.py", "--out", str(tmp_path)])
    assert check_gpu.main(Machine(torch.device("cuda", 0))) == 1
    said = capsys.readouterr().out
    assert said.startswith("FAIL  driver: The NVIDIA driver on your system is too old") and "built for CUDA" in said
