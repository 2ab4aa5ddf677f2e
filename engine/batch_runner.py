"""Batched execution of the named jobs of `infer.py`, in one process or in several.

`run_jobs` divides the jobs into batches and prints their results; a `JobRunner` of a model runs a batch. A job that
fails is reported, and the others continue. Batches, and therefore results, do not depend on the number of processes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from engine import STARTED
from engine.errors import UserError, printable, reason_of
from engine.files import writable
from engine.progress import current, stage
from engine.settings import ClusterConfig, NamedJob, RunConfig


@dataclass(frozen=True)
class Batch:
    """Jobs that are processed together.

    Attributes:
        jobs: the jobs, with their names.
        first: 1-based index of the first job.
        total: number of jobs in the whole command.
    """

    jobs: Sequence[NamedJob]
    first: int
    total: int


def batched(jobs: Sequence[NamedJob], size: int) -> list[Batch]:
    """Divide the jobs of a command into batches of up to `size` jobs."""
    return [Batch(jobs[start : start + size], start + 1, len(jobs)) for start in range(0, len(jobs), size)]


@dataclass
class BatchResult:
    """Results of the jobs of a batch.

    Attributes:
        device: device on which the batch ran.
        lines: one line for each job that succeeded.
        failed: name and error of each job that failed.
        speech_seconds: total length of the generated speech in seconds.
    """

    device: str = ""
    lines: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    speech_seconds: float = 0.0

    def print(self) -> None:
        """Print the failures to standard error, and the lines of the other jobs to standard output.

        The name of a failed job is not repeated if its error begins with it.
        """
        for name, error in self.failed:
            line = error if error.startswith(name) else f"{name}: {error}"
            print(printable(f"failed: {line}"), file=sys.stderr, flush=True)
        for line in self.lines:
            print(printable(line), flush=True)


def run_jobs(build: Callable[..., JobRunner], jobs: Sequence[NamedJob], c: RunConfig) -> int:
    """Run the jobs of a command and print their results and the elapsed time. Return the exit code: 1 if some failed.

    Args:
        build: creates the `JobRunner` of a process from the index of its GPU. It is pickled.

    Raises:
        UserError: If all jobs failed.
    """
    failed = []
    speech_seconds = 0.0
    with writable(c.output):
        for result in run_batches(build, batched(jobs, c.batch_size), c):
            result.print()
            failed += result.failed
            speech_seconds += result.speech_seconds
    if len(failed) == len(jobs):
        raise UserError(f"all {len(jobs)} {c.unit} failed; first error: {failed[0][1]}")
    count = f"{len(jobs) - len(failed)} of {len(jobs)} {c.unit} in {Path(c.output)}"
    elapsed = time.perf_counter() - STARTED
    print(printable(f"{count}: {speech_seconds:.1f} s of speech in {elapsed:.1f} s on {result.device}"))
    return 1 if failed else 0


@dataclass
class PreparedBatch:
    """A batch whose input files have been read.

    Attributes:
        result: results of the batch, including the jobs that have failed so far.
        is_only_job: whether the batch is the command's only job. Its error is then raised instead of reported.
        ready: name and prepared job of each job that did not fail.
        prefix: prefix of the progress display: number of the last job that was read, and of all jobs.
    """

    result: BatchResult
    is_only_job: bool
    ready: list[tuple[str, Any]] = field(default_factory=list)
    prefix: str = ""

    def show_progress(self) -> None:
        """Let the progress display, if this thread has one, name this batch."""
        if progress := current():
            progress.prefix = self.prefix

    @contextmanager
    def recording_errors(self, name: str) -> Iterator[None]:
        """Add an error in this block to the result, as the failure of the job `name`."""
        try:
            yield
        except Exception as error:
            if self.is_only_job:
                raise
            self.result.failed.append((name, reason_of(error)))


class JobRunner:
    """Base class for running jobs in three steps: prepare, generate, write. The constructor loads the models, once per
    process. The interface is that of `engine.processes.Work`.

    On an accelerator, a thread prepares the next batch while the current one is generated and written; on a CPU both
    would share its cores. So `prepare` must not change what `generate` and `write` read.

    Attributes:
        device: device of the models.
    """

    device: object

    def prepare(self, job: Any) -> Any:
        """Read the input files of a job."""
        raise NotImplementedError

    def generate(self, batch: list[Any]) -> Sequence[Any]:
        """Generate the results of prepared jobs."""
        raise NotImplementedError

    def write(self, name: str, prepared: Any, result: Any) -> tuple[str, float]:
        """Write the output files of a job. Return a summary line and the length of the speech in seconds."""
        raise NotImplementedError

    @property
    def details(self) -> str:
        return str(self.device)

    @property
    def ahead(self) -> int:
        """Number of batches to prepare in advance."""
        return int(not str(self.device).startswith("cpu"))

    def run(self, batch: Batch) -> BatchResult:
        """Prepare, generate and write the jobs of a batch."""
        return self.run_batch(self.prepare_batch(batch))

    def run_all(self, batches: Iterable[Batch]) -> Iterator[BatchResult]:
        """Yield the result of each batch, in order. See `ahead`."""
        prepared = map(self.prepare_batch, batches)
        return map(self.run_batch, prefetched(prepared) if self.ahead else prepared)

    def prepare_batch(self, batch: Batch) -> PreparedBatch:
        """Read the files of a batch."""
        prepared = PreparedBatch(BatchResult(self.details), is_only_job=batch.total == 1)
        for number, (name, job) in enumerate(batch.jobs, batch.first):
            if not prepared.is_only_job:
                prepared.prefix = f"{number}/{batch.total} "
            prepared.show_progress()
            with prepared.recording_errors(name):
                if isinstance(job, UserError):
                    raise job
                prepared.ready.append((name, self.prepare(job)))
        return prepared

    def run_batch(self, batch: PreparedBatch) -> BatchResult:
        """Generate the results of a batch and write its files."""
        ready = batch.ready
        batch.show_progress()
        results: Sequence[Any] = [None] * len(ready)
        if len(ready) > 1:
            with suppress(Exception):  # the jobs then run one by one, to find the one that fails
                results = self.generate([prepared for _, prepared in ready])
        for (name, prepared), result in zip(ready, results, strict=True):
            with batch.recording_errors(name):
                if result is None:
                    (result,) = self.generate([prepared])
                with stage("writing"):
                    line, seconds = self.write(name, prepared, result)
                batch.result.lines.append(line)
                batch.result.speech_seconds += seconds
        return batch.result


def prefetched(batches: Iterator[PreparedBatch]) -> Iterator[PreparedBatch]:
    """Yield each batch while a thread prepares the next one."""
    batch = next(batches, None)
    pool = ThreadPoolExecutor(1, "prepare")
    try:
        while batch is not None:
            following = pool.submit(next, batches, None)
            yield batch
            batch = following.result()
    finally:
        pool.shutdown(wait=False)  # the thread may be waiting for a batch that never arrives


def run_batches(build: Callable[..., JobRunner], batches: Sequence[Batch], c: RunConfig) -> Iterator[BatchResult]:
    """Return an iterator that runs the batches of a command, in this process or in several, and yields their results.

    Args:
        build: creates the `JobRunner` of a process from the index of its GPU. It is pickled.
        batches: all batches of the command.
    """
    from engine.device import count_devices  # slow to import

    devices = min(count_devices(c.devices, c.device, c.executor), len(batches))
    if devices > 1 or c.executor == "ray":
        return run_in_processes(build, batches, devices, c.ray if c.executor == "ray" else None)
    return build().run_all(batches)


def run_in_processes(
    build: Callable[[int], JobRunner], batches: Sequence[Batch], count: int, ray: ClusterConfig | None = None
) -> Iterator[BatchResult]:
    """Run batches in other processes and yield their results in the order in which they finish.

    Args:
        build: creates the `JobRunner` of a process from the index of its GPU. It is pickled.
        batches: all batches of the command.
        count: number of processes on this machine, which divide the CPU cores equally.
        ray: run the batches on a Ray cluster instead, which assigns cores and GPUs.
    """
    from engine.cluster import make_executor  # a run in this process does not need it
    from engine.processes import Lost, usable_cores

    if ray:
        count = min(ray.workers, len(batches))
    else:
        build = partial(_build_with_threads, build, max(1, usable_cores() // count))
    with make_executor(count, build, ray=ray) as executor, stage("in other processes", len(batches), "batches") as step:
        for batch, result in executor.run(batches):
            if isinstance(result, Lost):
                result = BatchResult(failed=[(name, result.reason) for name, _ in batch.jobs])
            result.device = f"{count} processes, {executor.details}"
            yield result
            step()


def _build_with_threads(build: Callable[[int], JobRunner], threads: int, index: int) -> JobRunner:
    """Build the runner of a process that is limited to `threads` threads."""
    import torch  # slow to import

    os.environ["OMP_NUM_THREADS"] = str(threads)  # thread count of libraries other than PyTorch
    torch.set_num_threads(threads)
    return build(index)
