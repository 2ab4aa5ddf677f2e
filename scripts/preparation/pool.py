"""Worker processes that a clip may crash or hang without harm to the job.

`concurrent.futures` gives up a whole pool when one process dies and cannot tell which task was to blame; here the task
is tried once more in a fresh process, and given up when that one dies too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from engine.errors import UserError
from scripts.preparation.worker import Outcome, Setup, Task, run_worker

ATTEMPTS = 2


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    task: Task | None = None
    since: float = 0.0
    attempt: int = 0


class Pool:
    """`count` worker processes. A context: leaving it ends them.

    Args:
        timeout: seconds that one clip may take.

    Attributes:
        digests: of the networks, as the workers loaded them.

    Raises:
        UserError: the stages cannot be built.
    """

    def __init__(self, count: int, setup: Setup, timeout: float) -> None:
        self.setup, self.timeout = setup, timeout
        self.workers = [self._start() for _ in range(count)]
        self.digests: dict[str, str] = {}

    def __enter__(self) -> Pool:
        try:
            for worker in self.workers:
                self.digests = self._await_ready(worker)
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
            self._next(worker, next(tasks, None))
        while busy := {worker.connection: worker for worker in self.workers if worker.task}:
            first = min(worker.since for worker in busy.values())
            ready = wait(list(busy), timeout=max(0.05, first + self.timeout - time.monotonic()))
            for connection in ready:
                worker = busy[connection]
                task = worker.task
                try:
                    word, answer = connection.recv()
                except (EOFError, ConnectionResetError):
                    outcome = self._died(worker)
                else:
                    if word == "error":
                        raise UserError(answer)
                    outcome = answer
                if outcome is not None:
                    yield task, outcome
                    self._next(worker, next(tasks, None))
            for connection, worker in busy.items():
                if connection not in ready and time.monotonic() - worker.since > self.timeout:
                    task = worker.task
                    self._replace(worker)
                    yield task, Outcome("crash", f"took longer than {self.timeout:g} s", suspicious=True)
                    self._next(worker, next(tasks, None))

    def _next(self, worker: _Worker, task: Task | None, attempt: int = 1) -> None:
        worker.task, worker.since, worker.attempt = task, time.monotonic(), attempt
        if task is not None:
            with suppress(BrokenPipeError, ConnectionResetError):  # it died while idle: `run` finds its pipe closed
                worker.connection.send(task)

    def _died(self, worker: _Worker) -> Outcome | None:
        """A fresh process in place of a dead one, with its task once more; the outcome where that is too often."""
        worker.process.join()
        code, task, attempt = worker.process.exitcode, worker.task, worker.attempt
        self._replace(worker)
        if attempt < ATTEMPTS:
            self._next(worker, task, attempt + 1)
            return None
        what = f"signal {-code}" if code and code < 0 else f"exit code {code}"
        return Outcome("crash", f"the process died at this clip, {ATTEMPTS} times ({what})", suspicious=True)

    def _replace(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        fresh = self._start()
        worker.process, worker.connection = fresh.process, fresh.connection
        self._await_ready(worker)

    def _start(self) -> _Worker:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=run_worker, args=(theirs, self.setup), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _await_ready(self, worker: _Worker) -> dict[str, str]:
        try:
            word, answer = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            raise UserError(
                f"a worker process ended with exit code {worker.process.exitcode} while loading its networks: "
                "is there memory for so many (workers=...)?"
            ) from None
        if word == "error":
            raise UserError(answer)
        return answer
