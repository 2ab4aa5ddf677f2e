"""Worker processes on this machine, each of which may crash, hang or be killed without affecting the others.

Each process has its own pipe, so that a killed process does not corrupt the communication of others, and its index
determines its device. With `concurrent.futures`, the death of one process breaks the whole pool; with pebble, processes
share a pipe and a lock.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from engine.errors import UserError
from engine.files import CHECKOUT
from engine.settings import LIMITS, Limits, set_limits

Item = TypeVar("Item")
Result = TypeVar("Result")
PR_SET_PDEATHSIG = 1  # option of Linux' prctl(2)
ATTEMPTS = 2  # attempts at an item whose process dies


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def script_environment(**variables: str) -> dict[str, str]:
    """Return the environment for a subprocess that runs this checkout's code: its packages come before those of
    PYTHONPATH.

    Args:
        variables: further environment variables.
    """
    paths = [str(CHECKOUT), str(CHECKOUT / "codecs"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables


class Work(Generic[Item, Result]):
    """Work of a worker process, created once in each process.

    Attributes:
        details: information for the caller, such as digests of weights.
        ahead: number of items that `run_all` may fetch before the result of the current item.
    """

    details: Any = None
    ahead = 0

    def run(self, item: Item) -> Result:
        """Process one item."""
        raise NotImplementedError

    def run_all(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield the result of each item, in order. Subclasses override this to prepare items in advance."""
        return map(self.run, items)


@dataclass(frozen=True)
class Lost:
    """Result of an item whose process died or timed out, with the reason."""

    reason: str


class _Process:
    """A worker process, its pipe, and its tasks, each with an item and the number of the attempt.

    Attributes:
        tasks: the current task and queued ones; at most `ahead` + 1.
        ahead: see `Work`.
        since: start time of the first task; infinity while the process is loading.
        starts: number of times that the process was started.
    """

    def __init__(self, number: int, build: Callable[[int], Work]) -> None:
        self.number = number
        self.build = build
        self.starts = 0
        self.ahead = 0
        self.tasks: deque[tuple[Any, int]] = deque()
        self.start()

    def start(self) -> None:
        context = get_context("spawn")  # forked processes would inherit locks of torch
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.build, self.number, LIMITS), daemon=True)
        self.process.start()
        theirs.close()
        self.since = math.inf
        self.starts = self.starts + 1

    def accepts(self, attempt: int) -> bool:
        """Return whether the process accepts a task of this attempt. A retried task runs alone."""
        if not self.tasks:
            return True
        alone = attempt > 1 or self.tasks[0][1] > 1
        return not alone and len(self.tasks) <= self.ahead and self.since < math.inf

    def give(self, task: tuple[Any, int]) -> None:
        if not self.tasks and self.since < math.inf:
            self.since = time.monotonic()
        self.tasks.append(task)
        with suppress(BrokenPipeError, ConnectionResetError):  # it died while idle, which `receive` detects
            self.connection.send(task[0])

    def is_ready(self, answer: tuple[Any, int]) -> Any:
        """Mark the process as loaded. Return the details of its work."""
        details, self.ahead = answer
        self.since = time.monotonic()
        return details

    def finish_task(self) -> tuple[Any, int]:
        """Remove and return the current task."""
        self.since = time.monotonic()
        return self.tasks.popleft()

    def restart(self) -> list[tuple[Any, int]]:
        """End the process and start it again. Return its queued tasks, which are removed."""
        tasks = list(self.tasks)
        self.tasks.clear()
        self.end()
        self.start()
        return tasks

    def poll(self, timeout: float) -> tuple[str, Any]:
        """Return the next message, see `receive`; ("waiting", None) if there is none yet, or ("late", reason) if the
        current task takes longer than `timeout` seconds.
        """
        if self.connection.poll():
            return self.receive()
        if time.monotonic() - self.since > timeout:
            return "late", f"it took longer than {timeout:g} s"
        return "waiting", None

    def receive(self) -> tuple[str, Any]:
        """Return the next message of `_serve`, or ("died", reason)."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            how = f"signal {-code}" if code and code < 0 else f"exit code {code}"
            if self.since < math.inf:
                return "died", how
            return "refused", f"a process ended with {how} while loading: use fewer processes if memory is short"

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Processes(Generic[Item, Result]):
    """A pool of worker processes. Entering the context waits until all are ready; leaving it ends them.

    Args:
        count: number of processes. 0 runs in the current process, without a timeout.
        build: creates the work in a process from its index, 0 to `count` - 1, or None in the current process.
        timeout: maximum seconds per item.
    """

    def __init__(
        self, count: int, build: Callable[[int | None], Work[Item, Result]], timeout: float = math.inf
    ) -> None:
        self.build = build
        self.timeout = timeout
        self.details: Any = None
        self.processes = [_Process(number, build) for number in range(count)]

    def __enter__(self) -> Processes[Item, Result]:
        if not self.processes:
            self._work = self.build(None)
            self.details = self._work.details
        try:
            for each in self.processes:
                word, details = each.receive()
                if word != "ready":
                    raise UserError(details)
                self.details = each.is_ready(details)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.processes:
            each.process.kill()  # start all processes before waiting for one
        for each in self.processes:
            each.end()

    def run(self, items: Iterable[Item]) -> Iterator[tuple[Item, Result | Lost]]:
        """Yield (item, result) pairs in the order of completion. Items are consumed when a process can start them.

        An item whose process dies is retried alone in another process. A process that cannot be restarted, for example
        because its GPU failed, is dropped.
        """
        if not self.processes:
            for item in items:
                yield item, self._work.run(item)
            return
        for each in self.processes:
            if each.tasks:  # of an earlier call that was not finished, whose results nobody wants
                each.restart()
        fresh = ((item, 1) for item in items)
        again = deque[tuple[Item, int]]()
        while True:
            self._give_tasks(fresh, again)
            busy = [each for each in self.processes if each.tasks]
            if not busy:
                return
            remaining = min(each.since for each in busy) + self.timeout - time.monotonic()
            wait([each.connection for each in busy], timeout=min(max(0.05, remaining), 60))
            for each in busy:
                word, result = each.poll(self.timeout)
                if word == "ready":
                    each.is_ready(result)
                elif word == "refused" and each.starts > 1 and len(self.processes) > 1:
                    print(f"{result}; {len(self.processes) - 1} processes continue", file=sys.stderr, flush=True)
                    self.processes.remove(each)
                    each.end()
                    again.extend(each.tasks)
                elif word in ("refused", "error"):
                    raise UserError(result)
                elif word == "done":
                    item, _ = each.finish_task()
                    yield item, result
                elif word == "late":
                    item, _ = each.finish_task()
                    again.extend(each.restart())
                    yield item, Lost(result)
                elif word == "died":
                    item, attempt = each.finish_task()
                    # A later task may have ended the process, too, as it was prepared concurrently.
                    again.extend((later, number + 1) for later, number in each.restart())
                    if attempt < ATTEMPTS:
                        again.append((item, attempt + 1))
                    else:
                        yield item, Lost(f"its process died, {ATTEMPTS} times ({result})")

    def _give_tasks(self, fresh: Iterator[tuple[Item, int]], again: deque[tuple[Item, int]]) -> None:
        """Assign tasks to the processes that accept them, idle processes first. Retries precede new items."""
        given = True
        while given:
            given = False
            for each in sorted(self.processes, key=lambda each: len(each.tasks)):
                if not each.accepts(again[0][1] if again else 1):
                    continue
                if task := again.popleft() if again else next(fresh, None):
                    each.give(task)
                    given = True


def _serve(connection: Connection, build: Callable[[int], Work], number: int, limits: Limits) -> None:
    """Run the work of one process: send ("ready", details) or ("refused", reason), then for every item ("done",
    result), or ("error", reason) if it cannot continue.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ignore Ctrl-C: the parent receives it, too, and ends this process
    word = "refused"
    with suppress(EOFError, BrokenPipeError):  # the parent process has ended
        try:
            set_limits(limits)
            work = build(number)
            connection.send(("ready", (work.details, work.ahead)))
            word = "error"
            for result in work.run_all(_receive_all(connection)):
                connection.send(("done", result))
        except UserError as error:
            connection.send((word, str(error)))


def _receive_all(connection: Connection) -> Iterator[Any]:
    """Yield received messages until the pipe is closed, which raises EOFError."""
    while True:
        yield connection.recv()


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C in this process during the block, and permanently in processes started within it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
