"""Batches of named jobs: failures are reported and counted, all other outputs are written."""

import os
import signal
from functools import partial
from itertools import chain

import pytest

from engine.batch_runner import JobRunner, batched, run_in_processes, run_jobs
from engine.errors import UserError
from engine.progress import current, showing
from engine.settings import ClusterConfig, RunConfig
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


def named(jobs):
    return [(f"job{job}", job) for job in jobs]


def failures(results):
    return list(chain.from_iterable(result.failed for result in results))


def test_a_single_batch_has_the_result_that_it_has_among_others():
    batches = batched(named([1, 2, 5]), 2)
    runner = Numbers(None)
    assert [runner.run(batch) for batch in batches] == [*runner.run_all(batches)]


def test_failures_are_reported_and_the_rest_is_written(tmp_path, capsys):
    batches = []
    settings = RunConfig(output=str(tmp_path), batch_size=2)
    assert run_jobs(partial(Numbers, None, batches), named([1, 2, 4, 6, 5, 7, 15, 11]), settings) == 1
    assert batches == [[1], [5, 7], [11]]  # nothing is left of the second batch
    out, err = capsys.readouterr()
    assert out.splitlines()[:-1] == ["job1: batch [1]", "job5: batch [5, 7]", "job11: batch [11]"]
    assert out.splitlines()[-1].startswith(f"3 of 8 jobs in {tmp_path}: 1.5 s")
    failed = [line.split(": ")[1:] for line in err.splitlines()]
    assert [name for name, *_ in failed] == ["job2", "job4", "job6", "job7", "job15"]
    assert failed[3] == ["job7", "the disk is full"] and failed[4][-1] == "by nothing"


def test_progress_counts_the_jobs_of_all_batches():
    prefixes = []

    class Noting(Numbers):
        def prepare(self, job):
            prefixes.append(current().prefix)
            return job

    with showing():
        list(Noting(None).run_all(batched(named([1, 3, 5]), 2)))
    assert prefixes == ["1/3 ", "2/3 ", "3/3 "]


def test_exit_code_0_without_failures_and_an_error_if_all_jobs_fail(tmp_path):
    settings = RunConfig(output=str(tmp_path))
    assert run_jobs(partial(Numbers, None), named([1, 3, 5]), settings) == 0
    with pytest.raises(UserError, match="2 is even"):
        run_jobs(partial(Numbers, None), named([2, 4]), settings)


def test_a_job_that_is_alone_in_its_batch_fails_as_others_do():
    assert failures(Numbers(None).run_all(batched(named([1, 3, 2]), 2))) == [("job2", "2 is even")]


@pytest.mark.parametrize(("job", "message"), [(2, "2 is even"), (7, "the disk is full")])
def test_the_error_of_a_single_job_is_raised(job, message, tmp_path, capsys):
    with pytest.raises(UserError, match=message):
        run_jobs(partial(Numbers, None), named([job]), RunConfig(output=str(tmp_path)))
    assert not capsys.readouterr().err


def test_a_batch_that_kills_its_process_fails_alone():
    results = list(run_in_processes(Numbers, batched(named([1, 3, 5, 9, 11, 4, 13]), 2), 2))
    lines = sorted(chain.from_iterable(result.lines for result in results))
    assert lines == ["job11: batch [11]", "job13: batch [13]", "job1: batch [1, 3]", "job3: batch [1, 3]"]
    died = "its process died, 2 times (signal 9)"
    assert sorted(failures(results)) == [("job4", "4 is even"), ("job5", died), ("job9", died)]
    assert sum(result.speech_seconds for result in results) == 2.0
    assert {result.device for result in results} == {"2 processes, cpu"}


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


@pytest.mark.slow
def test_a_batch_that_kills_its_process_fails_alone_on_a_ray_cluster():
    ray = pytest.importorskip("ray")
    batches = batched(named([1, 3, 5, 9, 11, 4, 13]), 2)
    try:
        results = list(run_in_processes(Numbers, batches, 1, ClusterConfig(workers=2)))
    finally:
        ray.shutdown()
    names = {line.partition(":")[0] for result in results for line in result.lines}
    assert names == {"job1", "job11", "job13", "job3"}
    died = "its process died, 3 times"
    assert sorted(failures(results)) == [("job4", "4 is even"), ("job5", died), ("job9", died)]
