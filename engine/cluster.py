"""Runs work on a Ray cluster, each item as a Ray task.

Ray retries a task whose process or machine died, and places it wherever processors and GPUs are free. A process of Ray
runs many tasks; it makes the work (loads the networks) for the first one and keeps it.

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
from engine.processes import Lost, Work
from engine.settings import LIMITS, ClusterConfig, Limits, set_limits

RETRIES = 2  # of a task whose process died
PATIENCE = 600.0  # seconds that a named cluster has to start a machine with enough GPUs
LOOK_EVERY = 5.0  # seconds between looks at the machines of the cluster
EXIT_AFTER = 2.0  # seconds in which the answer of a process that hangs is sent


class Cluster:
    """A Ray cluster that does work. A context: leaving it ends what this process runs there.

    Args:
        config: the cluster's address, how many items are processed at once, and the GPUs of each.
        build: makes the work in a process of the cluster; its argument is 0, as each process sees its own GPUs only.
        timeout: seconds that an item may take.
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
                raise UserError(f"ray.address={config.address}: no Ray cluster answers ({reason})") from error
            self.started_ray = True
        # Ray ends a process with a GPU after each task unless told otherwise.
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
        """Yield every item with its result, or `Lost`, in the order in which they finish."""
        waiting = iter(items)
        running: dict[Any, Any] = {}  # the item of each task
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
        """Return what was raised in a task, which Ray wraps, or what became of its process."""
        while isinstance(error, self.ray.exceptions.RayTaskError) and error.cause is not None:
            error = error.cause
        return error


Recipe = tuple[bytes, Callable[[int], Work], str, Limits]  # a name of the work, what makes it, folder, limits
_WORK: dict[bytes, Work] = {}  # of this process


def _work(recipe: Recipe) -> Work:
    """Return the work of this process, which is made when it is first needed."""
    key, build, folder, limits = recipe
    if key not in _WORK:
        os.chdir(folder)  # paths in settings are relative to where the command was typed
        set_limits(limits)
        _WORK[key] = build(0)
    return _WORK[key]


def _details(recipe: Recipe) -> Any:
    return _work(recipe).details


def _run(recipe: Recipe, item: Any, timeout: float) -> Any:
    """Process an item. If it takes too long, the answer is sent, then this process ends."""
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
