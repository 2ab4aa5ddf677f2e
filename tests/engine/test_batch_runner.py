"""Batches of named jobs: failures are reported and counted, all other outputs are written."""

import os
import signal
import time
from functools import partial

import pytest

from engine import batch_runner
from engine.batch_runner import JobRunner, Summary, batched, print_results, run_in_processes
from engine.errors import UserError
from engine.settings import ClusterConfig, check_place
from tests.waiting import wait_until


class Numbers(JobRunner):
    """Jobs are numbers; a result is a batch. Even jobs cannot be prepared, 7 cannot be written, 9 kills its process, 15
    ends its batch.

    Args:
        index: of the process.
        batches: list that gets each batch, in this process.
    """

    device = "cpu"

    def __init__(self, index, batches=None):
        self.batches = [] if batches is None else batches

    def prepare(self, job):
        if job % 2 == 0:
            raise UserError(f"{job} is even")
        return job

    def generate(self, batch):
        if 9 in batch:
            os.kill(os.getpid(), signal.SIGKILL)
        if 15 in batch:
            raise ZeroDivisionError("by nothing")
        self.batches.append(batch)
        return [batch] * len(batch)

    def write(self, name, job, result):
        if job == 7:
            raise UserError("the disk is full")
        return f"{name}: batch {result}", 0.5


def run(jobs, batch_size=2, **place):
    chosen = batched([(f"job{job}", job) for job in jobs], batch_size)
    batches = []
    if place:
        results = run_in_processes(Numbers, chosen, **place)
    else:
        results = Numbers(None, batches).run_all(chosen)
    summary = Summary()
    for result in results:
        print_results(result)
        summary.add(result)
    return summary, batches


def test_a_single_batch_has_the_result_that_it_has_among_others():
    batches = batched([(f"job{job}", job) for job in [1, 2, 5]], 2)
    runner = Numbers(None, [])
    assert [runner.run(batch) for batch in batches] == [*runner.run_all(batches)]


def test_failures_are_reported_and_the_rest_is_written(tmp_path, capsys, monkeypatch):
    summary, batches = run([1, 2, 4, 6, 5, 7, 15, 11])
    assert batches == [[1], [5, 7], [11]]  # nothing is left of the second batch
    unforeseen = "unexpected ZeroDivisionError: by nothing"
    errors = ["2 is even", "4 is even", "6 is even", "the disk is full", unforeseen]
    assert summary.lines == ["job1: batch [1]", "job5: batch [5, 7]", "job11: batch [11]"]
    assert summary.failed == [*zip(["job2", "job4", "job6", "job7", "job15"], errors)]
    out, err = capsys.readouterr()
    assert out == "job1: batch [1]\njob5: batch [5, 7]\njob11: batch [11]\n"
    assert err.splitlines()[0] == "failed: job2: 2 is even" and len(err.splitlines()) == 5
    monkeypatch.setattr(batch_runner, "STARTED", time.perf_counter() - 3.0)
    assert summary.report("jobs", tmp_path) == 1
    line = capsys.readouterr().out
    assert line.startswith(f"3 of 8 jobs in {tmp_path}: 1.5 s of speech in 3.") and line.endswith(" s on cpu\n")


def test_exit_code_0_without_failures_and_an_error_if_all_jobs_fail(tmp_path, capsys):
    assert run([1, 3, 5])[0].report("clips", tmp_path) == 0
    summary, batches = run([2, 4])
    assert not batches and capsys.readouterr().err == "failed: job2: 2 is even\nfailed: job4: 4 is even\n"
    with pytest.raises(UserError, match="all 2 clips of input=x failed; first error: 2 is even"):
        summary.report("clips", tmp_path, " of input=x")


def test_a_name_that_its_error_contains_is_repeated_on_request_only(capsys):
    result = Summary(2, failed=[("a.mp4", "a.mp4 is not a video"), ("b.mp4", "the disk is full")])
    print_results(result, repeat_names=False)
    assert capsys.readouterr().err == "failed: a.mp4 is not a video\nfailed: b.mp4: the disk is full\n"
    print_results(result)
    assert capsys.readouterr().err.startswith("failed: a.mp4: a.mp4 is not a video\n")


def test_a_job_that_is_alone_in_its_batch_fails_as_others_do():
    assert run([1, 3, 2])[0].failed == [("job2", "2 is even")]


@pytest.mark.parametrize(("job", "message"), [(2, "2 is even"), (7, "the disk is full")])
def test_the_error_of_a_single_job_is_raised(job, message, capsys):
    with pytest.raises(UserError, match=message):
        run([job])
    assert not capsys.readouterr().err


def test_a_batch_that_kills_its_process_fails_alone(tmp_path, capsys):
    summary, _ = run([1, 3, 5, 9, 11, 4, 13], count=2)
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == ["job11: batch [11]", "job13: batch [13]", "job1: batch [1, 3]",
                                        "job3: batch [1, 3]"]  # fmt: skip
    died = "its process died, 2 times (signal 9)"
    assert sorted(err.splitlines()) == ["failed: job4: 4 is even", f"failed: job5: {died}", f"failed: job9: {died}"]
    assert (len(summary.failed), summary.speech_seconds, summary.device) == (3, 2.0, "2 processes, cpu")
    assert summary.report("jobs", tmp_path) == 1


class OnDevice(JobRunner):
    """Jobs of an accelerator: one that is generated waits until the next one, if there is one, is being prepared."""

    device = "cuda:0"

    def __init__(self, folder, count, index):
        self.folder = folder
        self.count = count

    def prepare(self, job):
        (self.folder / str(job)).touch()
        return job

    def generate(self, batch):
        (job,) = batch
        if job + 1 < self.count:
            wait_until((self.folder / str(job + 1)).exists)
        return batch

    def write(self, name, job, result):
        return f"{name}: {result}", 0.0


def test_the_next_batch_is_prepared_while_this_one_is_generated(tmp_path):
    batches = batched([(str(job), job) for job in range(6)], 1)
    for processes in (0, 2):
        folder = tmp_path / f"{processes}"
        folder.mkdir()
        build = partial(OnDevice, folder, 6)
        if processes:
            lines = sorted(result.lines for result in run_in_processes(build, batches, processes))
        else:
            lines = [result.lines for result in build(0).run_all(batches)]
        assert lines == [[f"{job}: {job}"] for job in range(6)]


def test_a_ray_worker_without_a_gpu_must_run_on_the_cpu():
    with pytest.raises(UserError, match=r"ray\.gpus=0 with device=auto: set ray\.gpus=1"):
        check_place("ray", "1", "auto", 0.0)


@pytest.mark.slow
def test_a_batch_that_kills_its_process_fails_alone_on_a_ray_cluster(capsys):
    ray = pytest.importorskip("ray")
    try:
        summary, _ = run([1, 3, 5, 9, 11, 4, 13], count=1, ray=ClusterConfig(workers=2))
    finally:
        ray.shutdown()
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("job")]
    assert sorted(line.partition(":")[0] for line in lines) == ["job1", "job11", "job13", "job3"]
    died = "its process died, 3 times"
    assert {f"failed: job5: {died}", f"failed: job9: {died}", "failed: job4: 4 is even"} <= set(err.splitlines())
    assert len(summary.failed) == 3
