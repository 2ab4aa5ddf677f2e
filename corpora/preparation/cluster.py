"""Runs tasks on a Ray cluster: decoding and face tracking on any number of processors, networks in actors with GPUs.

Ray starts again what was lost: a task (`_cut`) whose process or machine died, an actor (`_Encoders`) with its calls,
and the cuts that were in a lost machine's memory. It also places them, and asks for more machines where it may. This
file says what runs where, how much is on its way at once, and what becomes of a clip that dies again and again.

All machines need the source and the output under the same paths.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import torch

from corpora.preparation.task import Cut, Outcome, Pipeline, Setup, Task
from engine.errors import UserError
from engine.media.limits import set_limits
from engine.settings import check_settings, setting

RETRIES = 2  # of a task or call whose process died; then its clips are tried alone, and given up when that fails too
AHEAD = 3  # clips on their way for each processor of the cluster: enough to keep it busy, few enough for its memory
LOOK_EVERY = 10.0  # seconds between looks at the size of the cluster
TRIED = ".slow"  # suffix of the mark that a clip took too long


@dataclass(frozen=True)
class RayConfig:
    """Settings `ray` of configs/prepare.yaml.

    address: of a running cluster: "auto" (that of this machine) or HOST:PORT; None: start one here.
    encoders: actors with networks. gpus: of each. batch: clips that go through their networks together.
    """

    address: str | None = None
    encoders: int = setting(1, 1, 4096)
    gpus: float = setting(0.0, 0.0, 8.0)
    batch: int = setting(8, 1, 256)

    def __post_init__(self) -> None:
        check_settings(self, "ray.")


@dataclass(frozen=True)
class _Group:
    """Tasks whose clips are encoded together, by the actor of that number. alone: 1 for a clip that is tried by itself,
    2 while nothing else is on its way, either: a process that dies fails all that waits for it."""

    tasks: list[Task]
    actor: int
    alone: int = 0


class RayPool:
    """The cluster at work. A context: leaving it ends what this process has running there.

    Args:
        count: processors to use where no cluster is named. setup: of the stages. timeout: seconds for a clip's first
            half (decoding, face, crops).

    Attributes:
        digests, fingerprints: of the networks and stages, as the actors loaded them; see `task.Pipeline`.

    Raises:
        UserError: Ray is not installed, the cluster cannot be reached, or the stages cannot be built.
    """

    def __init__(self, count: int, setup: Setup, timeout: float, config: RayConfig) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError("executor=ray needs Ray: bash scripts/setup.sh cluster") from error
        self.ray, self.count, self.setup, self.timeout, self.config = ray, count, setup, timeout, config
        self.digests: dict[str, str] = {}
        self.fingerprints: dict[str, str] = {}
        self.flying: dict[Any, _Group] = {}
        self.suspects: list[_Group] = []
        self._size, self._looked = 0, -LOOK_EVERY
        self.ours = False

    def __enter__(self) -> RayPool:
        ray, config = self.ray, self.config
        path = os.pathsep.join(os.path.abspath(each) for each in sys.path)
        options = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}}
        options |= {"log_to_driver": False, "logging_level": logging.ERROR}
        if not ray.is_initialized():
            local = {"address": "local", "num_cpus": self.count}
            try:
                ray.init(**({"address": config.address} if config.address else local), **options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(f"ray.address={config.address}: no Ray cluster answers ({_line(error)})") from error
            self.ours = True
        # without a processor of its own: on a cluster that has shrunk to one, it would leave none to `_cut`
        lasting = {"max_restarts": -1, "max_task_retries": RETRIES}
        kind = ray.remote(_Encoders).options(num_cpus=0, num_gpus=config.gpus, **lasting)
        folder = os.getcwd()
        try:
            self.encoders = [kind.remote(self.setup, folder) for _ in range(config.encoders)]
            about = ray.get([each.about.remote() for each in self.encoders])
        except BaseException as error:
            self.__exit__()
            if isinstance(self._cause(error), UserError):
                raise UserError(str(self._cause(error))) from error
            raise
        self.digests, self.fingerprints = about[0]
        self.shared = ray.put((self.setup, self.fingerprints, folder))
        self.cut = ray.remote(_cut).options(num_cpus=1, max_retries=RETRIES, name="decode, face, crops")
        return self

    def __exit__(self, *_: object) -> None:
        if self.ours:
            self.ray.shutdown()

    def run(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Outcome]]:
        """Every task with its outcome, in the order in which they are done.

        Raises:
            UserError: no clip can cause what happened, as on a full disk.
        """
        ray, groups = self.ray, self._groups(tasks)
        while True:
            while sum(len(group.tasks) for group in self.flying.values()) < self._most():
                group = next(groups, None)
                if group is None:
                    break
                self._start(group)
            if not self.flying and self.suspects:
                self._start(self.suspects.pop())
            if not self.flying:
                return
            done, _ = ray.wait(list(self.flying), num_returns=1, timeout=60)
            for each in done:
                group = self.flying.pop(each)
                try:
                    outcomes = ray.get(each)
                except ray.exceptions.RayError as error:
                    cause = self._cause(error)
                    if isinstance(cause, UserError):
                        raise UserError(str(cause)) from error
                    if not isinstance(cause, ray.exceptions.RayError):
                        raise
                    outcomes = self._again(group, cause)
                yield from zip(group.tasks, outcomes)

    def _groups(self, tasks: Iterator[Task]) -> Iterator[_Group]:
        """Tasks that follow each other in a shard, up to `batch` together, and the actors by turns."""
        part, number = [], 0
        for task in tasks:
            if part and (len(part) == self.config.batch or task.work != part[0].work):
                yield _Group(part, number % len(self.encoders))
                part, number = [], number + 1
            part.append(task)
        if part:
            yield _Group(part, number % len(self.encoders))

    def _start(self, group: _Group) -> None:
        cuts = [self.cut.remote(self.shared, task, self.timeout) for task in group.tasks]
        encode = self.encoders[group.actor].encode.options(name="networks")
        self.flying[encode.remote(*cuts)] = group

    def _again(self, group: _Group, error: Exception) -> list[Outcome]:
        """Ray has given a group up: try its clips one by one, to learn which one it is; a clip alone has failed.

        A machine that went away is no clip's fault, however often.
        """
        kinds = self.ray.exceptions
        lost = isinstance(error, kinds.NodeDiedError | kinds.ObjectLostError) or "node has died" in str(error)
        if group.alone and not lost:
            if isinstance(error, kinds.RayActorError) and group.alone == 1:
                self.suspects.append(_Group(group.tasks, group.actor, alone=2))
                return []
            return [Outcome("crash", "the process died at this clip again and again", machine_fault=True)]
        for task in group.tasks:
            self._start(_Group([task], group.actor, max(1, group.alone)))
        return []

    def _most(self) -> int:
        """Clips that may be on their way, by the processors that the cluster has now."""
        if time.monotonic() - self._looked > LOOK_EVERY:
            self._size, self._looked = int(self.ray.cluster_resources().get("CPU", 1)), time.monotonic()
        return max(AHEAD * self._size, 2 * self.config.batch * self.config.encoders)

    def _cause(self, error: BaseException) -> BaseException:
        """What was raised in a task or actor, or became of its process: Ray wraps it once for each task it passes."""
        while isinstance(error, self.ray.exceptions.RayTaskError) and error.cause is not None:
            error = error.cause
        return error


class _Encoders:
    """An actor with the networks: the second half of tasks."""

    def __init__(self, setup: Setup, folder: str) -> None:
        _enter(folder, setup)
        self.error, self.pipeline = "", None
        try:
            self.pipeline = Pipeline(setup)
        except UserError as error:  # from a constructor Ray would tell it as the death of the actor
            self.error = str(error)

    def about(self) -> tuple[dict[str, str], dict[str, str]]:
        if self.error:
            raise UserError(self.error)
        return self.pipeline.digests, self.pipeline.fingerprints

    def encode(self, *cuts: Cut) -> list[Outcome]:
        return self.pipeline.encode(cuts)


_PIPELINES: dict[str, Pipeline] = {}  # of this process, by fingerprints: Ray uses a process for many tasks


def _cut(shared: tuple[Setup, dict[str, str], str], task: Task, timeout: float) -> Cut:
    """The first half of a task. A clip that takes too long ends its process, and is known by its mark the next time."""
    setup, fingerprints, folder = shared
    name = repr((fingerprints, folder))
    if name not in _PIPELINES:
        _enter(folder, setup)
        _PIPELINES[name] = Pipeline(setup, fingerprints)
    mark = task.work / f"{task.clip.key}{TRIED}"
    if mark.exists():
        mark.unlink()
        return Cut(task, outcome=Outcome("crash", f"took longer than {timeout:g} s", machine_fault=True))
    timer = threading.Timer(timeout, _give_up, (mark,))
    timer.daemon = True
    timer.start()
    try:
        return _PIPELINES[name].cut(task)
    finally:
        timer.cancel()


def _give_up(mark: os.PathLike) -> None:
    with open(mark, "w"):
        pass
    os._exit(1)


def _enter(folder: str, setup: Setup) -> None:
    os.chdir(folder)  # paths in settings are relative to where the command was typed
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    set_limits(setup.limits)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
