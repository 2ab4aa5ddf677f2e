"""Runs tasks in the worker processes of one machine; a clip that crashes or hangs its process does not end the job.

`concurrent.futures` gives up a whole pool when one process dies and cannot tell which task it was; here the task is
tried once more in a new process, and given up when that one dies too.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import cv2
import torch

from corpora.preparation.task import Outcome, Pipeline, Setup, Task
from engine.errors import UserError
from engine.media.limits import set_limits
from engine.processes import end_with_parent

ATTEMPTS = 2


@dataclass
class _Worker:
    """A process, its end of the pipe, and its task. since: when it began with the task; infinity: not yet ready."""

    process: BaseProcess
    connection: Connection
    task: Task | None = None
    since: float = math.inf
    attempt: int = 0


class ProcessPool:
    """`count` worker processes. A context: leaving it ends them.

    Args:
        timeout: seconds that one clip may take.

    Attributes:
        digests, fingerprints: of the networks and stages, as the workers loaded them; see `task.Pipeline`.

    Raises:
        UserError: the stages cannot be built.
    """

    def __init__(self, count: int, setup: Setup, timeout: float) -> None:
        self.setup, self.timeout = setup, timeout
        self.workers = [self._start() for _ in range(count)]
        self.digests: dict[str, str] = {}
        self.fingerprints: dict[str, str] = {}

    def __enter__(self) -> ProcessPool:
        try:
            for worker in self.workers:
                self._receive(worker)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.connection.close()

    def run(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Outcome]]:
        """Every task with its outcome, in the order in which they are done; a task is taken when a worker is free.

        Raises:
            UserError: a worker cannot go on, as on a full disk.
        """
        for worker in self.workers:
            self._give(worker, next(tasks, None))
        while busy := [worker for worker in self.workers if worker.task]:
            first = min(worker.since for worker in busy) + self.timeout - time.monotonic()
            wait([worker.connection for worker in busy], timeout=min(max(0.05, first), 60))
            for worker in busy:
                task, outcome = worker.task, None
                if worker.connection.poll():
                    outcome = self._receive(worker)
                elif time.monotonic() - worker.since > self.timeout:
                    self._replace(worker)
                    outcome = Outcome("crash", f"took longer than {self.timeout:g} s", machine_fault=True)
                if outcome is not None:
                    yield task, outcome
                    self._give(worker, next(tasks, None))

    def _receive(self, worker: _Worker) -> Outcome | None:
        """The outcome that a worker sends; None if it reports that it is ready, or died and was replaced."""
        try:
            word, answer = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            return self._died(worker)
        if word == "error":
            raise UserError(answer)
        if word == "ready":
            self.digests, self.fingerprints = answer
            worker.since = time.monotonic()
            return None
        return answer

    def _give(self, worker: _Worker, task: Task | None, attempt: int = 1) -> None:
        worker.task, worker.attempt = task, attempt
        if worker.since < math.inf:
            worker.since = time.monotonic()
        if task is not None:
            with suppress(BrokenPipeError, ConnectionResetError):  # it died while idle; `_receive` will notice
                worker.connection.send(task)

    def _died(self, worker: _Worker) -> Outcome | None:
        """A fresh process in place of a dead one, with its task once more; the outcome where that is too often.

        Raises:
            UserError: it died before it was ready, which no clip can cause.
        """
        worker.process.join()
        code, task, attempt = worker.process.exitcode, worker.task, worker.attempt
        what = f"signal {-code}" if code and code < 0 else f"exit code {code}"
        if worker.since == math.inf:
            raise UserError(
                f"a worker process ended with {what} while loading its networks: lower workers=... if memory is short"
            )
        self._replace(worker)
        if attempt < ATTEMPTS:
            self._give(worker, task, attempt + 1)
            return None
        return Outcome("crash", f"the process died at this clip, {ATTEMPTS} times ({what})", machine_fault=True)

    def _replace(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        fresh = self._start()
        worker.process, worker.connection, worker.since = fresh.process, fresh.connection, math.inf

    def _start(self) -> _Worker:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.setup), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)


def _work(connection: Connection, setup: Setup) -> None:
    """Body of a worker process: sends ("ready", (digests, fingerprints)), then for every task ("done", outcome), or
    ("error", message) if it cannot continue.
    """
    end_with_parent()  # it would disturb the next job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    torch.set_num_threads(1)  # more workers use a machine better than more threads
    cv2.setNumThreads(1)
    with suppress(EOFError, BrokenPipeError):  # the parent has ended
        try:
            set_limits(setup.limits)
            pipeline = Pipeline(setup)
            connection.send(("ready", (pipeline.digests, pipeline.fingerprints)))
            while True:
                connection.send(("done", pipeline.process(connection.recv())))
        except UserError as error:
            connection.send(("error", str(error)))
