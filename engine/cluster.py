"""Execution of work items on a Ray cluster, one Ray task per item.

Ray retries a task whose process or machine died, and schedules it wherever CPUs and GPUs are free. A Ray worker process
runs many tasks: it builds the work (loads the networks) for the first task and reuses it.

All machines need inputs and outputs under the same paths.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from typing import Any

from engine.errors import UserError
from engine.processes import Lost, Processes, Work
from engine.settings import LIMITS, ClusterConfig, Limits, set_limits

RETRIES = 2  # retries of a task whose process died
PATIENCE = 600.0  # seconds to wait for a cluster to start a machine with enough GPUs
LOOK_EVERY = 5.0  # seconds between two polls of the cluster's machines
EXIT_AFTER = 2.0  # seconds allowed for sending the result of a timed-out process


def make_executor(
    count: int, build: Callable[[int], Work], timeout: float = math.inf, ray: ClusterConfig | None = None
) -> Processes | Cluster:
    """Return the executor of work items, a context manager: processes of this machine, or a Ray cluster.

    Args:
        count: number of processes, see `Processes`; on a cluster, `ray.workers` replaces it.
        build: creates the work in a process. It is pickled.
        timeout: maximum seconds per item.
        ray: settings of the cluster. None: processes of this machine.
    """
    return Cluster(ray, build, timeout) if ray else Processes(count, build, timeout)


class Cluster:
    """A Ray cluster that processes work items. Leaving the context ends all tasks that this process runs there.

    Args:
        config: address of the cluster, number of concurrent items, and GPUs per item.
        build: creates the work in a worker process. Its argument is always 0, as each process sees only its own GPUs.
        timeout: maximum seconds per item.
    """

    def __init__(self, config: ClusterConfig, build: Callable[[int], Work], timeout: float = math.inf) -> None:
        import ray  # an extra, see `check_place`

        self.ray = ray
        self.config = config
        self.build = build
        self.timeout = timeout
        self.details: Any = None
        self.started_ray = False

    def __enter__(self) -> Cluster:
        ray = self.ray
        config = self.config
        path = os.pathsep.join(os.path.abspath(each) for each in sys.path)
        options = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}}
        options |= {"log_to_driver": False, "logging_level": logging.ERROR}
        if not ray.is_initialized():
            local = {"address": "local", "num_cpus": config.workers}
            try:
                ray.init(**({"address": config.address} if config.address else local), **options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise UserError(f"ray.address={config.address}: no Ray cluster responds ({reason})") from error
            self.started_ray = True
        # By default, Ray ends a GPU process after each task.
        resources = {"num_cpus": 1, "num_gpus": config.gpus, "max_retries": RETRIES, "max_calls": 0}
        self.task = ray.remote(**resources)(_run)
        self.recipe = ray.put((os.urandom(8), self.build, os.getcwd(), LIMITS))
        try:
            first = ray.remote(**resources)(_details).remote(self.recipe)
            self._wait_for_place(first)
            self.details = ray.get(first)
        except BaseException as error:
            self.__exit__()
            if isinstance(cause := self._cause(error), UserError):
                raise UserError(str(cause)) from error
            raise
        return self

    def _wait_for_place(self, first: Any) -> None:
        """Wait until the first task has finished; raise UserError if no machine provides the requested GPUs."""
        deadline = time.monotonic() + (0 if self.started_ray and not self.config.address else PATIENCE)
        while not self.ray.wait([first], timeout=LOOK_EVERY)[0]:
            most = max((node["Resources"].get("GPU", 0) for node in self.ray.nodes() if node["Alive"]), default=0)
            if self.config.gpus > most and time.monotonic() > deadline:
                raise UserError(
                    f"ray.gpus={self.config.gpus:g}, but no machine of the cluster has more than {most:g} GPUs: "
                    "lower it, or start Ray there with --num-gpus"
                )

    def __exit__(self, *_: object) -> None:
        if self.started_ray:
            self.ray.shutdown()

    def run(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield (item, result) pairs in the order in which they finish. The result of a failed item is `Lost`."""
        waiting = iter(items)
        running: dict[Any, Any] = {}  # maps each task to its item
        exhausted = False
        while True:
            while len(running) < self.config.workers and not exhausted:
                try:
                    item = next(waiting)
                except StopIteration:
                    exhausted = True
                else:
                    running[self.task.remote(self.recipe, item, self.timeout)] = item
            if not running:
                return
            for task in self.ray.wait(list(running), num_returns=1, timeout=60)[0]:
                item = running.pop(task)
                yield item, self._result(task)

    def _result(self, task: Any) -> Any:
        """Return the result of a finished task, or `Lost` if its process died at each attempt."""
        try:
            return self.ray.get(task)
        except self.ray.exceptions.RayError as error:
            cause = self._cause(error)
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            if isinstance(cause, self.ray.exceptions.RayError):
                return Lost(f"its process died, {RETRIES + 1} times")
            raise

    def _cause(self, error: BaseException) -> BaseException:
        """Return the original exception of a task, which Ray wraps, or the reason why its process ended."""
        while isinstance(error, self.ray.exceptions.RayTaskError) and error.cause is not None:
            error = error.cause
        return error


Recipe = tuple[bytes, Callable[[int], Work], str, Limits]  # name of the work, its builder, folder, limits
_WORK: dict[bytes, Work] = {}  # of this process


def _work(recipe: Recipe) -> Work:
    """Return the work of this process, which is created on first use."""
    key, build, folder, limits = recipe
    if key not in _WORK:
        os.chdir(folder)  # paths in settings are relative to the working directory of the command
        set_limits(limits)
        _WORK[key] = build(0)
    return _WORK[key]


def _details(recipe: Recipe) -> Any:
    return _work(recipe).details


def _run(recipe: Recipe, item: Any, timeout: float) -> Any:
    """Process an item. On timeout, send the answer and then end this process."""
    run = _work(recipe).run
    if timeout == math.inf:
        return run(item)
    pool = ThreadPoolExecutor(1)
    result = pool.submit(run, item)
    try:
        return result.result(timeout)
    except TimeoutError:
        if result.done():  # raised by the work
            raise
        threading.Timer(EXIT_AFTER, os._exit, (1,)).start()
        return Lost(f"it took longer than {timeout:g} s")
    finally:
        pool.shutdown(wait=False)
