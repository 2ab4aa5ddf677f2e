"""Run work on a Ray cluster: first halves on any number of processors, second halves in actors with GPUs.

Ray starts again what was lost: a task (`_cut`) whose process or machine died, an actor (`_Encoders`) with its calls,
and the halves that were in a lost machine's memory. It also places them, and asks for more machines where it may. This
file says what runs where, how much is on its way at once, and what becomes of an item that dies again and again.

All machines need inputs and outputs under the same paths.
"""

from __future__ import annotations

import itertools
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

RETRIES = 2  # of a task or call whose process died; then its item is tried again, and given up when that fails too
AHEAD = 3  # items on their way for each processor of the cluster: enough to keep it busy, few enough for its memory
LOOK_EVERY = 10.0  # seconds between looks at the size of the cluster
EXIT_AFTER = 2.0  # seconds in which the answer of a process that hangs goes out


class Cluster:
    """The cluster at work. A context: leaving it ends what this process has running there.

    Args:
        build: makes the work in an actor, from 0, as each actor sees its own GPUs only.
        build_cut: makes work that can `cut` alone, on any processor; None: items go to the actors as they are.
        timeout: seconds that the first half of an item may take.
        processors: to use where no cluster is named.
    """

    def __init__(
        self,
        config: ClusterConfig,
        build: Callable[[int], Work],
        build_cut: Callable[[int], Work] | None = None,
        timeout: float = math.inf,
        processors: int = 1,
    ) -> None:
        import ray  # an extra, see `check_place`

        self.ray, self.config, self.build, self.build_cut = ray, config, build, build_cut
        self.timeout, self.processors = timeout, processors
        self.about: Any = None
        self.flying: dict[Any, tuple[Any, int]] = {}  # the item of a call, and how often Ray gave it up before
        self._size, self._looked = 0, -LOOK_EVERY
        self.ours = False

    def __enter__(self) -> Cluster:
        ray, config = self.ray, self.config
        path = os.pathsep.join(os.path.abspath(each) for each in sys.path)
        options = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}}
        options |= {"log_to_driver": False, "logging_level": logging.ERROR}
        if not ray.is_initialized():
            local = {"address": "local", "num_cpus": self.processors}
            try:
                ray.init(**({"address": config.address} if config.address else local), **options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise UserError(f"ray.address={config.address}: no Ray cluster answers ({reason})") from error
            self.ours = True
        # without a processor of its own: on a cluster that has shrunk to one, it would leave none to `_cut`
        lasting = {"max_restarts": -1, "max_task_retries": RETRIES}
        kind = ray.remote(_Encoders).options(num_cpus=0, num_gpus=config.gpus, **lasting)
        self.cut = ray.remote(_cut).options(num_cpus=1, max_retries=RETRIES, name="cut")
        self.starts = [ray.put((os.urandom(8), build, os.getcwd(), LIMITS)) for build in (self.build, self.build_cut)]
        try:
            actors = [kind.remote() for _ in range(config.encoders)]
            self.about = ray.get([each.about.remote(self.starts[0]) for each in actors])[0]
        except BaseException as error:
            self.__exit__()
            if isinstance(self._cause(error), UserError):
                raise UserError(str(self._cause(error))) from error
            raise
        self.actors = itertools.cycle(actors)
        return self

    def __exit__(self, *_: object) -> None:
        if self.ours:
            self.ray.shutdown()

    def run(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield every item with its result, or `Lost`, in the order in which they are done."""
        ray, fresh, suspects = self.ray, iter(items), []
        while True:
            for item in itertools.islice(fresh, max(0, self._most() - len(self.flying))):
                self._start(item)
            if not self.flying and suspects:
                self._start(suspects.pop(), given_up=2)
            if not self.flying:
                return
            for call in ray.wait(list(self.flying), num_returns=1, timeout=60)[0]:
                item, given_up = self.flying.pop(call)
                try:
                    result = ray.get(call)
                except ray.exceptions.RayError as error:
                    cause = self._cause(error)
                    if isinstance(cause, UserError):
                        raise UserError(str(cause)) from error
                    if not isinstance(cause, ray.exceptions.RayError):
                        raise
                    kinds = ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError
                    if given_up == 0 or isinstance(cause, kinds) or "node has died" in str(cause):
                        self._start(item, max(1, given_up))  # a machine that went away is no item's fault
                        continue
                    if given_up == 1 and isinstance(cause, ray.exceptions.RayActorError):
                        suspects.append(item)  # an actor that dies fails all calls that wait for it: try it alone
                        continue
                    result = Lost("its process died again and again")
                yield item, result

    def _start(self, item: Any, given_up: int = 0) -> None:
        half = item if self.build_cut is None else self.cut.remote(self.starts[1], item, self.timeout)
        self.flying[next(self.actors).do.remote(self.starts[0], half)] = item, given_up

    def _most(self) -> int:
        """Return how many items may be on their way, by the processors that the cluster has now."""
        if time.monotonic() - self._looked > LOOK_EVERY:
            self._size, self._looked = int(self.ray.cluster_resources().get("CPU", 1)), time.monotonic()
        return max(AHEAD * self._size if self.build_cut else 0, 2 * self.config.encoders)

    def _cause(self, error: BaseException) -> BaseException:
        """Return what was raised in a task or actor, or became of its process: Ray wraps it once for each task."""
        while isinstance(error, self.ray.exceptions.RayTaskError) and error.cause is not None:
            error = error.cause
        return error


Start = tuple[bytes, Callable[[int], Work], str, Limits]  # a name of the work, what makes it, and where
_WORK: dict[bytes, Work] = {}  # of this process: Ray uses a process for many tasks


def _work(start: Start) -> Work:
    """Return the work of this process, made when it is first needed."""
    key, build, folder, limits = start
    if key not in _WORK:
        os.chdir(folder)  # paths in settings are relative to where the command was typed
        set_limits(limits)
        _WORK[key] = build(0)
    return _WORK[key]


class _Encoders:
    """An actor with the networks: second halves."""

    def about(self, start: Start) -> Any:
        return _work(start).about

    def do(self, start: Start, half: Any) -> Any:
        """Do the second half of an item; one that was lost in its first half stays so."""
        return half if isinstance(half, Lost) else _work(start).do(half)


def _cut(start: Start, item: Any, timeout: float) -> Any:
    """Do the first half of an item; of one that takes too long the answer goes out, then its process ends."""
    cut = _work(start).cut
    if timeout == math.inf:
        return cut(item)
    thread = ThreadPoolExecutor(1)
    half = thread.submit(cut, item)
    try:
        return half.result(timeout)
    except TimeoutError:
        if half.done():  # raised by the work
            raise
        threading.Timer(EXIT_AFTER, os._exit, (1,)).start()
        return Lost(f"it took longer than {timeout:g} s")
    finally:
        thread.shutdown(wait=False)
