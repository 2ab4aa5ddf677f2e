"""Run the named jobs of `infer.py` in batches: in this process, in one for each device, or on a Ray cluster.

A job that fails is reported, and the others go on. Batches are the same wherever they run, and so are their results.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from engine import STARTED
from engine.cluster import Cluster
from engine.errors import UserError, printable, require
from engine.hub import check_release
from engine.processes import Lost, Processes, Work
from engine.progress import current, stage
from engine.settings import (
    DEVICES,
    EXECUTORS,
    PRECISIONS,
    ClusterConfig,
    Group,
    Limits,
    check_place,
    group,
    set_limits,
    setting,
)

Batch = tuple[Sequence[tuple[str, Any]], int, int]  # named jobs, the number of the first of them, and of all jobs
WORD_FILES = (".json", ".srt", ".vtt")  # endings of the files of timestamps=true


@dataclass(frozen=True)
class RunConfig(Group):
    """Settings that `infer.py` has for every model: where jobs are done, and how."""

    output: str = setting("outputs", about="folder of the results")
    device: str = setting("auto", choices=DEVICES, about="auto, cpu, cuda or mps")
    devices: str = setting("1", about="number of devices, each with a process; all: those of this machine")
    executor: str = setting(
        "processes", choices=EXECUTORS, about="where batches run: processes (of this machine), or ray (extra `cluster`)"
    )
    ray: ClusterConfig = group(ClusterConfig, about="with executor=ray")
    precision: str = setting(
        "auto",
        choices=PRECISIONS,
        about="fp32, bf16, or auto: bf16 on processors that multiply it themselves (CUDA, AVX-512 BF16, AMX); "
        "int8: transformer blocks in 8 bits (x86 with VNNI; on CUDA weights alone)",
    )
    compile: bool = setting(False, about="compile the sampler's steps: faster, after minutes of compiling in each run")
    batch_size: int = setting(8, 1, 1024, "number of clips or jobs processed at once")
    figure: bool = setting(True, about="write the figure NAME.png of a face; false leaves an earlier one in place")
    timestamps: bool = setting(False, about="write the times of words: NAME.json, .srt and .vtt; needs setup.sh eval")
    limits: Limits = group(Limits, about="larger inputs are rejected before they are decoded")

    def __post_init__(self) -> None:
        Group.__post_init__(self)  # not that of a job, which is for the jobs made of it
        check_place(self.executor, self.devices, self.device, self.ray.gpus)

    def begin(self, releases: Mapping[str, str | None]) -> None:
        """Apply the limits; check that the release folders, by setting, and the packages that are needed are there."""
        set_limits(self.limits)
        for key, folder in releases.items():
            check_release(key, folder)
        if self.timestamps:
            require("pocketsphinx", "pocketsphinx")


@dataclass
class Summary:
    """Results of all jobs, or of those of a batch.

    failed: name and error of each that failed; the name is empty if the error tells it. lines: about the others.
    """

    jobs: int
    failed: list[tuple[str, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    speech_seconds: float = 0.0
    device: str = ""

    def add(self, part: Summary) -> None:
        """Print the lines of a batch, and count its jobs."""
        for name, error in part.failed:
            print(printable(f"failed: {f'{name}: ' if name else ''}{error}"), file=sys.stderr, flush=True)
        for line in part.lines:
            print(printable(line), flush=True)
        self.failed += part.failed
        self.speech_seconds += part.speech_seconds

    def report(self, kind: str, output: Path, origin: str = "") -> int:
        """Print the figures, and the seconds since the command began. Return the exit code: 1 if a job failed.

        Args:
            kind: plural of the kind of a job. origin: where the jobs came from, such as " of input=FOLDER".
        """
        count = self.jobs - len(self.failed)
        if not count:
            raise UserError(f"none of the {self.jobs} {kind}{origin} could be done; the first: {self.failed[0][1]}")
        speech = f"{self.speech_seconds:.1f} s of speech in {time.perf_counter() - STARTED:.1f} s on {self.device}"
        print(printable(f"{count} of {self.jobs} {kind} in {output}: {speech}"))
        return 1 if self.failed else 0


@dataclass
class _Prepared:
    """A batch between its two halves. ready: name and what `Jobs.prepare` returned, of the jobs that did not fail."""

    summary: Summary
    alone: bool
    ready: list[tuple[str, Any]] = field(default_factory=list)


class Jobs(Work[Batch, Summary]):
    """The work on jobs of one kind, made once in each process: load (the constructor), prepare, generate, write.

    On an accelerator, a thread prepares the next batch while this one is generated and written; on a processor both
    would share its cores. So `prepare` must not change what `generate` and `write` read.

    name_errors: put a job's name before its error; not needed if the name is a path that the error contains.
    """

    device: object
    name_errors = False

    @property
    def ahead(self) -> int:
        """Batches that are prepared ahead."""
        return int(not str(self.device).startswith("cpu"))

    def prepare(self, job: Any) -> Any:
        """Read the files of a job."""
        raise NotImplementedError

    def generate(self, batch: list[Any]) -> Sequence[Any]:
        """Generate the results of a batch."""
        raise NotImplementedError

    def write(self, name: str, prepared: Any, result: Any) -> tuple[str, float]:
        """Write the files of a job. Return a line about them, and the seconds of speech."""
        raise NotImplementedError

    @property
    def details(self) -> str:
        return str(self.device)

    def run(self, item: Batch) -> Summary:
        """Prepare, generate and write the jobs of a batch. The error of a job that is the only one is raised."""
        return self._finish(self._prepare(item))

    def run_all(self, items: Iterable[Batch]) -> Iterator[Summary]:
        if not self.ahead:
            yield from map(self.run, items)
            return
        batches = map(self._prepare, items)
        prepared = next(batches, None)
        pool = ThreadPoolExecutor(1, "prepare")
        try:
            while prepared is not None:
                following = pool.submit(next, batches, None)
                yield self._finish(prepared)
                prepared = following.result()
        finally:
            pool.shutdown(wait=False)  # it may be waiting for a batch that does not come

    def _prepare(self, item: Batch) -> _Prepared:
        jobs, first, total = item
        prepared = _Prepared(Summary(len(jobs)), alone=total == 1)
        for number, (name, job) in enumerate(jobs, first):
            if total > 1 and (progress := current()):
                progress.prefix = f"{number}/{total} "
            with self._failing(prepared, name):
                prepared.ready.append((name, self.prepare(job)))
        return prepared

    def _finish(self, batch: _Prepared) -> Summary:
        summary, ready = batch.summary, batch.ready
        try:
            results = self.generate([prepared for _, prepared in ready]) if ready else []
        except Exception:
            if batch.alone:
                raise
            results = [None] * len(ready)  # one by one, to find the job that ends its batch
        for (name, prepared), result in zip(ready, results, strict=True):
            with self._failing(batch, name):
                if result is None:
                    (result,) = self.generate([prepared])
                with stage("writing"):
                    line, seconds = self.write(name, prepared, result)
                summary.speech_seconds += seconds
                summary.lines.append(line)
        return summary

    @contextmanager
    def _failing(self, batch: _Prepared, name: str) -> Iterator[None]:
        """Note the error of a job in the summary of its batch."""
        try:
            yield
        except Exception as error:
            if batch.alone:
                raise
            line = str(error) if isinstance(error, UserError) else f"unforeseen {type(error).__name__}: {error}"
            batch.summary.failed.append((name if self.name_errors else "", line))


def _on_device(start: Callable[[], Jobs], threads: int | None, number: int) -> Jobs:
    """Make the `Jobs` of another process, whose number is that of its device, with so many threads (None: all)."""
    os.environ["LOCAL_RANK"] = str(number)  # `pick_device` goes by it
    if threads:
        import torch  # slow to import

        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    return start()


def run_batches(
    jobs: Sequence[tuple[str, Any]],
    batch_size: int,
    start: Callable[[], Jobs],
    devices: int = 1,
    ray: ClusterConfig | None = None,
) -> Summary:
    """Do (name, job) pairs, `batch_size` at a time, and print a line for each; failures go to standard error.

    Args:
        start: makes the `Jobs`, in this process, or in one for each device or Ray worker, to which it is pickled.
    """
    firsts = range(0, len(jobs), batch_size)
    batches = [(jobs[first : first + batch_size], first + 1, len(jobs)) for first in firsts]
    summary = Summary(len(jobs))
    count = min(ray.workers if ray else devices, len(batches))
    if count == 1 and not ray:
        work = start()
        summary.device = work.details
        for part in work.run_all(batches):
            summary.add(part)
    else:
        threads = None if ray else max(1, len(os.sched_getaffinity(0)) // count)  # Ray divides them itself
        build = partial(_on_device, start, threads)
        executor = Cluster(ray, build) if ray else Processes(count, build)
        with executor, stage("in other processes", len(batches), "batches") as step:
            summary.device = f"{count} processes, {executor.details}"
            for batch, part in executor.run(batches):
                if isinstance(part, Lost):
                    part = Summary(len(batch[0]), [(name, part.reason) for name, _ in batch[0]])
                summary.add(part)
                step()
    return summary
