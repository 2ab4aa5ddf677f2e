"""The same toy run with one process and with several, by DDP, FSDP and hybrid sharding."""

import json

import parallel_runs
import pytest
import torch
from toy_task import ToyBlocks, read_lines

from engine.errors import UserError
from engine.release import read_release
from engine.training import parallel
from engine.training.export import export
from tests.forked import run_group

COMMON = {"schedule": "constant", "validate_every": 1000, "checkpoint_every": 1000, "steps": 6}
GLOBAL = 4  # batches of a step, over all processes


def job(run, processes, node=None, task="blocks", **changes):
    changes = COMMON | {"accumulate": GLOBAL // processes} | changes
    return {"run": str(run), "node": node or processes, "task": task, "changes": changes}


def alone(run, **more):
    parallel_runs.run(job(run, 1, **more))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of finished runs, by name."""
    root = tmp_path_factory.mktemp("runs")
    alone(root / "one")
    alone(root / "1_2_1", steps=2)
    alone(root / "measured_one", task="measured", validate_every=2)
    jobs = [
        job(root / "ddp", 2),
        job(root / "fsdp", 2, parallel="fsdp", peak_tflops=0.1),
        job(root / "each", 2, parallel="fsdp", reduce_each=True, reshard_after_forward=False),
        job(root / "ddp_bf16", 2, precision="bf16"),
        job(root / "fsdp_bf16", 2, precision="bf16", parallel="fsdp"),
        job(root / "machines", 2, node=1, parallel="hybrid", checkpointing=True),
        job(root / "1_2_1", 2, parallel="fsdp", steps=4),  # a checkpoint of one process, and then one for one
        job(root / "changing", 2, steps=2),
        job(root / "changing", 2, parallel="fsdp", steps=4),
        job(root / "changing", 2),
        job(root / "lia_x", 2, task="lia_x", steps=4),
        job(root / "lia_x_fsdp", 2, task="lia_x", steps=4, parallel="fsdp"),
        job(root / "measured", 2, task="measured", validate_every=2),
        job(root / "measured_fsdp", 2, task="measured", validate_every=2, parallel="fsdp"),
    ]
    run_group(root, 2, parallel_runs.worker, jobs)
    alone(root / "1_2_1")
    return root


def losses(run):
    lines = read_lines(run / "log.jsonl")
    keys = ("discriminator/loss", "generator/loss", "generator/grad_norm", "discriminator/grad_norm")
    return torch.tensor([[line[key] for key in keys] for line in lines if "lr" in line], dtype=torch.float64)


def released(run):
    return torch.load(run / "weights.pt", weights_only=True)


def assert_equal_runs(one, two, tolerance=1e-5):
    a = losses(one)
    b = losses(two)
    assert a.shape == (COMMON["steps"], 4)
    assert ((a - b) / a).abs().max() < tolerance
    # Released weights are averages, gathered from shards; a tied weight stays tied, a frozen one is there.
    mine = released(one)
    its = released(two)
    assert mine.keys() == its.keys() and "tied.weight" in mine and "frozen.weight" in mine
    for name, value in mine.items():
        assert type(its[name]) is torch.Tensor
        if name != "seen":  # every process counts its own samples
            torch.testing.assert_close(its[name], value, rtol=100 * tolerance, atol=10 * tolerance, msg=name)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "each", "machines", "1_2_1", "changing"])
def test_every_strategy_equals_one_process(runs, name):
    assert_equal_runs(runs / "one", runs / name)


def test_levels_that_grow_later_train_in_two_processes(runs):
    logs = [read_lines(runs / name / "log.jsonl") for name in ("lia_x", "lia_x_fsdp")]
    copies, shards = ([line["loss"] for line in log if "lr" in line] for log in logs)
    assert len(copies) == 4 and copies == pytest.approx(shards, rel=1e-4)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp_bf16", "machines", "1_2_1"])
def test_one_process_exports_the_checkpoint_of_several(runs, tmp_path, name):
    export(runs / name, tmp_path / "out")
    state = read_release(tmp_path / "out", "toy")[1]
    whole = released(runs / name)
    assert state.keys() == {k.removeprefix("generator.") for k in whole if k.startswith("generator.")}
    for key, value in state.items():
        assert torch.equal(value, whole[f"generator.{key}"].half().float()), key


def test_machines_with_unequal_numbers_of_processes_are_refused_by_all(monkeypatch):
    monkeypatch.setattr(parallel.distributed, "all_gather", lambda value: [4, 12])
    with pytest.raises(UserError, match="not 4 and 12"):
        parallel._mesh("hybrid", torch.device("cpu"))


@pytest.mark.slow
def test_two_nodes_equal_one(runs):
    run_group(runs, 4, parallel_runs.worker, [job(runs / "2x2", 4, node=2, parallel="hybrid")])
    assert_equal_runs(runs / "one", runs / "2x2")


@pytest.mark.slow
def test_three_ranks_resume_bit_for_bit(tmp_path):
    """The order in which DDP adds up three gradients must not depend on how long a run has been going on."""
    runs = [("whole", 6), ("parts", 2), ("parts", 6)]
    jobs = [job(tmp_path / name, 3, task="gan", steps=steps, accumulate=1) for name, steps in runs]
    run_group(tmp_path, 3, parallel_runs.worker, jobs)
    whole = released(tmp_path / "whole")
    parts = released(tmp_path / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_the_loss_of_a_step_does_not_depend_on_how_it_is_divided(tmp_path):
    """A mean over tokens, one over clips, and their sum: in one batch, in micro-batches, and in several processes.

    A step has 8 samples with 1 to 12 tokens each.
    """

    def ragged(name, processes, batch_size=8, **changes):
        run = tmp_path / name
        return job(run, processes, task="ragged", steps=4, global_batch_size=8, batch_size=batch_size, **changes)

    for name, size in {"1": 8, "1x2": 4, "1x8": 1}.items():
        parallel_runs.run(ragged(name, 1, size))
    run_group(tmp_path, 2, parallel_runs.worker, [ragged("2", 2), ragged("2_fsdp", 2, parallel="fsdp")])
    run_group(tmp_path, 4, parallel_runs.worker, [ragged("4", 4)])

    def figures(name):
        lines = [line for line in read_lines(tmp_path / name / "log.jsonl") if "lr" in line]
        return [[line[key] for key in ("loss", "token", "clip", "grad_norm")] for line in lines]

    whole = figures("1")
    assert len(whole) == 4 and whole[0] != whole[-1]
    for name in ("1x2", "1x8", "2", "2_fsdp", "4"):
        for one, two in zip(whole, figures(name), strict=True):
            assert two == pytest.approx(one, rel=1e-5), name
        for key, value in released(tmp_path / "1").items():
            torch.testing.assert_close(released(tmp_path / name)[key], value, rtol=1e-4, atol=1e-6)


def test_bfloat16_fsdp_equals_bfloat16_ddp(runs):
    assert_equal_runs(runs / "ddp_bf16", runs / "fsdp_bf16", tolerance=0.02)
    assert not torch.equal(losses(runs / "one"), losses(runs / "fsdp_bf16"))


def test_parameters_are_sharded_and_gradients_reduced_once_per_step(runs):
    facts = {name: json.loads((runs / name / "facts.json").read_text()) for name in ("ddp", "fsdp", "each", "machines")}
    whole = sum(p.numel() for p in ToyBlocks().parameters())
    assert facts["ddp"]["held"] == whole
    assert whole / 2 <= facts["fsdp"]["held"] < 0.6 * whole
    assert facts["machines"]["held"] == whole  # one process a machine: each holds a copy
    # The root in both parts and two blocks in the generator's, however many batches are accumulated.
    assert facts["fsdp"]["reduced"] == 4 * COMMON["steps"]
    assert facts["each"]["reduced"] == GLOBAL // 2 * facts["fsdp"]["reduced"]  # no gradient waits whole for the last


@pytest.mark.parametrize("name", ["measured", "measured_fsdp"])
def test_ranks_divide_a_validation(runs, name):
    """The figures are those of one process, and no process measures what another one does."""

    def validations(name):
        lines = [line for line in read_lines(runs / name / "log.jsonl") if "validation/weight" in line]
        return [{k: v for k, v in line.items() if k.startswith("validation/")} for line in lines]

    for one, two in zip(validations("measured_one"), validations(name), strict=True):
        assert one.keys() == {"validation/weight", "validation/seen", "validation/drawn"}
        assert one.pop("validation/seen") == 2 * two.pop("validation/seen")  # the first process's own
        assert two == pytest.approx(one, rel=1e-6)
    for folder in (runs / name / "validation").iterdir():
        files = sorted(path.name for path in folder.iterdir())
        assert files == ["clip0-0.txt", "clip1-0.txt", "clip2-1.txt", "clip3-1.txt", "clip4-1.txt"]


def test_a_failing_validation_ends_all_ranks(tmp_path):
    jobs = [job(tmp_path, 2, task="failing", validate_every=2)]
    said = run_group(tmp_path, 2, parallel_runs.worker, jobs, code=1)
    assert "process 1" in said[0] and "no such clip" in said[1].splitlines()[-1]
