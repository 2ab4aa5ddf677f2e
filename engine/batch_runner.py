"""Runs the named jobs of `infer.py` in batches: a job that fails is reported, and the others go on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from engine.errors import UserError, printable
from engine.progress import current, set_prefix, stage

Job = TypeVar("Job")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


@dataclass
class Summary:
    """What became of the jobs.

    Attributes:
        jobs: how many there were.
        failed: error of each job that failed.
        speech_seconds: duration of the speech that was written.
        seconds: wall time.
    """

    jobs: int
    failed: list[str] = field(default_factory=list)
    speech_seconds: float = 0.0
    seconds: float = 0.0

    def report(self, kind: str, output: Path, device: object, origin: str = "") -> int:
        """Print the figures, and the command's seconds in each stage; returns the exit code: 1 if a job failed.

        Args:
            kind: plural of what a job is. origin: where the jobs came from, such as " of input=FOLDER".
        """
        done = self.jobs - len(self.failed)
        if not done:
            raise UserError(f"none of the {self.jobs} {kind}{origin} could be done; the first: {self.failed[0]}")
        progress = current()
        seconds = progress.wall if progress else self.seconds
        speech = f"{self.speech_seconds:.1f} s of speech in {seconds:.1f} s on {device}"
        print(printable(f"{done} of {self.jobs} {kind} in {output}: {speech}"))
        if progress:
            stages = sorted(progress.seconds.items(), key=lambda stage: stage[0] == "other")
            print("of which " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages))
        return 1 if self.failed else 0


def run_batches(
    jobs: Sequence[tuple[str, Job]],
    batch_size: int,
    prepare: Callable[[Job], Prepared],
    process: Callable[[list[Prepared]], Sequence[Result]],
    write: Callable[[str, Prepared, Result], tuple[str, float]],
    name_errors: bool = False,
) -> Summary:
    """Prepare, process and write named jobs, `batch_size` at a time. A failure is printed to standard error.

    Args:
        jobs: (name, job) pairs.
        prepare: reads the files of a job.
        process: computes a batch.
        write: writes the files of a job; returns a line to print and the seconds of speech in the files.
        name_errors: print the job's name with its error; not needed if the name is a path that the error contains.
    """
    summary, start = Summary(len(jobs)), time.monotonic()

    @contextmanager
    def failing(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if len(jobs) == 1:
                raise
            line = str(error) if isinstance(error, UserError) else f"unforeseen {type(error).__name__}: {error}"
            summary.failed.append(" ".join(line.split()))
            line = f"failed: {f'{name}: ' if name_errors else ''}{summary.failed[-1]}"
            print(printable(line), file=sys.stderr, flush=True)

    for first in range(0, len(jobs), batch_size):
        batch: list[tuple[str, Prepared]] = []
        for number, (name, job) in enumerate(jobs[first : first + batch_size], first + 1):
            set_prefix(f"{number}/{len(jobs)} " if len(jobs) > 1 else "")
            with failing(name):
                batch.append((name, prepare(job)))
        try:
            results = [[result] for result in process([prepared for _, prepared in batch])] if batch else []
        except Exception:
            if len(batch) == 1 == len(jobs):
                raise
            results = [[] for _ in batch]  # one by one, to find the job that ends its batch
        for (name, prepared), result in zip(batch, results, strict=True):
            with failing(name):
                result = result or process([prepared])
                with stage("writing"):
                    line, seconds = write(name, prepared, *result)
                summary.speech_seconds += seconds
                print(printable(line), flush=True)
    summary.seconds = time.monotonic() - start
    return summary
