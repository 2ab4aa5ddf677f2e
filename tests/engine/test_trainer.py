import gzip
import json
import os
import resource
import signal
import weakref
from pathlib import Path

import pytest
import torch
from toy_task import CONFIG, ToyBlocks, ToyGAN, ToySet, read_lines

from engine.errors import UserError
from engine.release import read_release
from engine.training import signals
from engine.training.settings import TrainerConfig
from engine.training.signals import stop_requests
from engine.training.tracking import Tracker
from engine.training.trainer import Trainer

VALIDATED = {"best": "min weight", "keep": 9}
OWED = 14  # a multiple of CONFIG["validate_every"], not of "checkpoint_every"
TIMES = ("samples_per_s", "tokens_per_s", "data_wait", "step_s", "memory_gib")


def trainer(run, dataset=None, task=ToyGAN, fresh=False, **changes):
    torch.manual_seed(0)
    config = TrainerConfig(**CONFIG | changes).shared_among(1)
    return Trainer(task(), dataset or ToySet(), config, run, fresh=fresh)


def records(run):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_lines(Path(run) / "log.jsonl")]


def assert_same_state(one, two):
    a, b = one._state(), two._state()
    assert a.keys() == b.keys() and len(a) > 20
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of 20 steps."""
    run = trainer(tmp_path_factory.mktemp("whole"))
    assert run.fit() is not None
    assert [line["step"] for line in records(run.run) if "lr" in line] == list(range(1, 21))
    return run


@pytest.mark.parametrize("trouble", ["term", "usr1", "crash"])
def test_an_interrupted_run_equals_an_unbroken_one_bit_for_bit(tmp_path, whole, trouble):
    # Sample 8 * 12 + 3 belongs to step 13: a signal saves that step, a crash falls back to the checkpoint of step 10.
    first = trainer(tmp_path / "broken", ToySet(trouble_at=8 * 12 + 3, trouble=trouble))
    if trouble != "crash":
        assert first.fit() is None and first.step == 13
    else:
        with pytest.raises(RuntimeError, match="died"):
            first.fit()
        assert first.step == 12
    second = trainer(tmp_path / "broken")
    second.fit()
    assert second.step == 20
    assert_same_state(whole, second)
    assert records(whole.run) == records(tmp_path / "broken")


@pytest.mark.parametrize("change", [{"workers": 2}, {"peak_tflops": 1.0}])
def test_worker_processes_and_flop_counting_change_no_bit(tmp_path, change):
    plain, changed = trainer(tmp_path / "a", steps=6), trainer(tmp_path / "b", steps=6, **change)
    plain.fit(), changed.fit()
    assert_same_state(plain, changed)


def test_a_finished_run_is_not_trained_again_without_fresh(tmp_path):
    trainer(tmp_path, steps=6).fit()
    again = trainer(tmp_path, ToySet(trouble_at=1), steps=6)  # would crash at the first sample
    assert again.fit() is not None and again.step == 6
    with pytest.raises(RuntimeError, match="died"):
        trainer(tmp_path, ToySet(trouble_at=1), fresh=True).fit()


def test_averaged_weights_are_validated_and_released(tmp_path, whole):
    average = whole.ema.averages["generator.0.weight"]
    assert not torch.equal(whole.task.generator[0].weight, average)
    assert whole.validate()["weight"] == pytest.approx(average.sum().item(), abs=1e-7)
    whole.release(tmp_path / "release")
    _, released = read_release(tmp_path / "release", "toy")
    assert torch.equal(released["0.weight"], average.half().float())


@pytest.mark.parametrize("part", ["discriminator", "generator"])
def test_a_gradient_that_is_not_finite_stops_the_run_with_a_checkpoint(tmp_path, part):
    class NotFinite(ToyGAN):
        def forward(self, batch, current):
            losses = super().forward(batch, current)
            if current == part and self.step == 6:
                losses["loss"] = losses["loss"] * float("nan")
            return losses

    run = trainer(tmp_path, task=NotFinite)
    listed = ", ".join(str(i) for number in (12, 13) for i in run.batches.samples(number))
    with pytest.raises(UserError, match=f"{part} in step 7 .*{listed}"):
        run.fit()
    again = trainer(tmp_path, steps=8)  # with another task, or other data
    again.fit()
    assert all(p.isfinite().all() for p in again.task.parameters())
    assert [line["step"] for line in records(tmp_path) if "lr" in line] == [*range(1, 9)]


def test_a_sample_that_is_not_finite_is_named(tmp_path):
    run = trainer(tmp_path, ToySet(trouble_at=17, trouble="nan"))  # the first one of step 3's first batch
    listed = ", ".join(map(str, run.batches.samples(4)))
    with pytest.raises(UserError, match=f"samples {listed} "):
        run.fit()


def test_a_model_without_blocks_cannot_be_checkpointed(tmp_path):
    with pytest.raises(UserError, match="ToyGAN has no blocks"):
        trainer(tmp_path, checkpointing=True)


def test_the_sanity_validation_fails_before_the_first_step(tmp_path):
    class Failing(ToyGAN):
        def measure(self, folder, share):
            raise RuntimeError("no such recogniser")

    run = trainer(tmp_path, task=Failing)
    with pytest.raises(RuntimeError, match="no such recogniser"):
        run.fit()
    assert run.step == 0
    run = trainer(tmp_path, task=Failing, steps=2, sanity_validation=False)
    with pytest.raises(RuntimeError, match="no such recogniser"):
        run.fit()
    assert run.step == 2


def test_the_best_checkpoint_by_validation_is_kept(tmp_path):
    trainer(tmp_path, keep=1, best="max weight", validate_every=4, checkpoint_every=100).fit()
    seen = {line["step"]: line["validation/weight"] for line in records(tmp_path) if "validation/weight" in line}
    best = max(seen, key=seen.get)
    assert best < 20
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"step-{best:08d}", "step-00000020"}


def test_a_checkpoint_that_does_not_fit_the_disk_keeps_the_last_one(tmp_path, whole):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk():
        run.checkpoints.wait()  # that of step 10 is whole before, however slow the disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    run = trainer(tmp_path, ToySet(trouble_at=8 * 12 + 3, trouble=fill_the_disk))
    try:
        with pytest.raises(UserError, match=r"step-00000015.*File too large"):
            run.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run = trainer(tmp_path)
    run.fit()
    assert_same_state(whole, run)


def test_a_profile_of_the_requested_steps_is_written(tmp_path):
    trainer(tmp_path, steps=9, profile=2).fit()
    with gzip.open(tmp_path / "profile/rank0.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"ProfilerStep#5", "ProfilerStep#6", "aten::linear"} <= names and "ProfilerStep#7" not in names


def train_arguments(run, **changes):
    settings = CONFIG | {"log_every": 1} | changes
    words = [f"trainer.{k}={json.dumps(v)}" for k, v in settings.items()]
    target = "task={_target_: tests.engine.toy_task.ToyGAN}"
    return ["name=toy", f"run={run}", target, "data={train: {_target_: tests.engine.toy_task.ToySet}}", *words]


class Watched(ToyGAN):
    """Counts the generator's results that are alive."""

    def __init__(self):
        super().__init__()
        self.results = []
        self.most = 0

    def forward(self, batch, part):
        losses = super().forward(batch, part)
        self.results.append(weakref.ref(batch["y"]))
        self.most = max(self.most, sum(result() is not None for result in self.results))
        return losses


@pytest.mark.parametrize("accumulate", [1, 8])
def test_one_autograd_graph_is_alive_at_a_time(tmp_path, accumulate):
    run = trainer(tmp_path, task=Watched, accumulate=accumulate, steps=3)
    run.fit()
    assert run.task.most <= 2
    assert int(run.task.seen) == 3 * 4 * accumulate  # what is made again for the second part is not counted again


def test_the_global_batch_size_is_divided_among_processes():
    config = TrainerConfig(**CONFIG | {"global_batch_size": 32, "batch_size": 8, "accumulate": 5})
    shares = {count: config.shared_among(count) for count in (1, 4, 8, 32)}
    sizes = {count: (share.batch_size, share.accumulate) for count, share in shares.items()}
    assert sizes == {1: (8, 4), 4: (8, 1), 8: (4, 1), 32: (1, 1)}
    for count in (3, 64):
        with pytest.raises(UserError, match=f"{count} processes"):
            config.shared_among(count)


def test_recomputation_counts_in_hfu_and_not_in_mfu(tmp_path):
    def operations(again):
        run = tmp_path / str(again)
        trainer(run, task=ToyBlocks, peak_tflops=1e-6, steps=1, accumulate=1, checkpointing=again).fit()
        line = read_lines(run / "log.jsonl")[0]
        return [line[share] * line["step_s"] for share in ("mfu", "hfu")]

    plain = operations(False)
    model, hardware = operations(True)
    assert plain[0] == plain[1] == pytest.approx(model) and hardware > model


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """Folder of a run that nothing stopped, whose every validated step is saved."""
    run = tmp_path_factory.mktemp("validated")
    trainer(run, **VALIDATED).fit()
    return run


def assert_same_records(whole, broken):
    assert records(whole) == records(broken)
    assert [record["step"] for record in records(whole) if "lr" not in record] == [7, 14, 20]
    one, two = (run / f"checkpoints/step-{OWED:08d}/results.json" for run in (whole, broken))
    assert one.read_text() == two.read_text()


def test_a_run_that_stops_before_a_validation_catches_up_on_it(validated, tmp_path):
    signal = ToySet(trouble_at=8 * (OWED - 1) + 1, trouble="term")  # with the first of 8 samples of this step
    assert trainer(tmp_path, signal, **VALIDATED).fit() is None
    assert records(tmp_path)[-1]["step"] == OWED and "lr" in records(tmp_path)[-1]
    trainer(tmp_path, **VALIDATED).fit()
    assert_same_records(validated, tmp_path)


@pytest.mark.parametrize("where", ["measure", "write", "note"])
def test_a_killed_validation_is_recorded_once(validated, tmp_path, monkeypatch, where):
    run = trainer(tmp_path, **VALIDATED)
    owner = {"measure": run.task, "write": Tracker, "note": run.checkpoints}[where]
    original = getattr(owner, where)

    def kill(*arguments):
        if run.step == OWED and (where != "write" or "lr" not in arguments[-1]):
            run.checkpoints.wait()  # that of this step is whole, however slow the disk
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, where, kill)
        run.fit()
    trainer(tmp_path, **VALIDATED).fit()
    assert_same_records(validated, tmp_path)


def test_a_second_ctrl_c_interrupts(monkeypatch):
    monkeypatch.setattr(signals, "ONE_PRESS", 0.0)
    with pytest.raises(KeyboardInterrupt), stop_requests() as stops:
        os.kill(os.getpid(), signal.SIGINT)
        assert stops
        os.kill(os.getpid(), signal.SIGINT)
