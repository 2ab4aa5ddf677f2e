"""What one worker process does: builds the stages once, then runs them over the clips that it is sent."""

from __future__ import annotations

import ctypes
import errno
import inspect
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import torch
from omegaconf import OmegaConf
from safetensors.torch import save

from corpora.preparation.clip import Clip, SourceClip, Stage, Suspicious
from engine.config import build, target
from engine.errors import UserError
from engine.shards.writer import dumps, keep
from engine.training.distributed import pick_device

# What no clip can be blamed for: the disk is full or read-only, or the machine is out of file handles.
FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}
LONGEST_REASON = 300
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Task:
    """One clip to prepare. root: of its paths. work: work folder of its shard."""

    clip: SourceClip
    root: Path
    work: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a clip.

    Attributes:
        stage, reason: where and why it was refused; "" if it is in its work folder.
        suspicious: refused for what may be the machine's fault.
        seconds: by stage, on the clock and of the processor. frames: of the clip, at 25 a second.
    """

    stage: str = ""
    reason: str = ""
    suspicious: bool = False
    seconds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    frames: int = 0


@dataclass(frozen=True)
class Setup:
    """What a worker builds its stages from: their config by name, the word for the device, the source's phonemes."""

    stages: Mapping[str, Mapping[str, Any]]
    device: str
    symbols: list[str] | None


def build_stages(setup: Setup) -> dict[str, Stage]:
    """The stages by name, in order. Those that ask for `device` or `symbols` get them.

    Raises:
        UserError: a setting is wrong, or weights or a package are missing.
    """
    device = pick_device(setup.device)
    offered = {"device": device, "symbols": setup.symbols}
    stages = {}
    for name, config in setup.stages.items():
        asked = inspect.signature(target(config["_target_"])).parameters
        extra = {key: value for key, value in offered.items() if key in asked}
        stages[name] = build(OmegaConf.create(dict(config)), **extra)
    return stages


def collect_digests(stages: Mapping[str, Stage]) -> dict[str, str]:
    """By network, the digest of its weights."""
    return {name: digest for stage in stages.values() for name, digest in getattr(stage, "digests", dict)().items()}


@torch.inference_mode()
def process(task: Task, stages: Mapping[str, Stage]) -> Outcome:
    """Run the stages over one clip and put it into its work folder. Whatever is wrong with a clip refuses just it.

    Raises:
        UserError: the disk is full, or something else that no clip can be blamed for.
    """
    clip = Clip(task.clip, task.root)
    try:
        return _process(clip, task, stages)
    finally:
        clip.close()


def _process(clip: Clip, task: Task, stages: Mapping[str, Stage]) -> Outcome:
    seconds: dict[str, tuple[float, float]] = {}
    for name, stage in stages.items():
        start = _clocks()
        try:
            if not (stage.needs == "frames" and clip.info.video is None):
                stage(clip)
        except Exception as error:
            _check_blameable(error)
            known = isinstance(error, UserError)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            suspicious = isinstance(error, Suspicious) or not known
            return Outcome(name, _tidy(reason, clip), suspicious, seconds)
        finally:
            seconds[name] = _since(start)
    start = _clocks()
    facts = {"key": task.clip.key, **clip.facts, "text": clip.facts["text"] or ""}  # readers want a string
    members = {"json": dumps(facts)}
    members["safetensors"] = save({name: tensor.contiguous() for name, tensor in clip.tensors.items()})
    keep(task.work, task.clip.key, members | clip.files)
    seconds["write"] = _since(start)
    return Outcome(seconds=seconds, frames=clip.length)


def _clocks() -> tuple[float, float]:
    """The time, and what this process and its finished children have had of the processor."""
    return time.perf_counter(), sum(os.times()[:4])


def _since(start: tuple[float, float]) -> tuple[float, float]:
    wall, processor = _clocks()
    return wall - start[0], processor - start[1]


def _check_blameable(error: BaseException) -> None:
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError) and at.errno in FATAL:
            raise UserError(f"{at.strerror} ({error}); what is done stays, the same command goes on from there")
        at = at.__cause__ or at.__context__


def _tidy(reason: str, clip: Clip) -> str:
    """One line that is the same whenever and wherever the clip fails."""
    for folder in (clip.root, clip.unpacked.name if clip.unpacked else clip.root):
        reason = reason.replace(f"{folder}/", "")
    reason = " ".join(reason.split())
    reason = re.sub(r"0x[0-9a-fA-F]{6,}", "0x", reason)
    return reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."


def run_worker(connection: Connection, setup: Setup) -> None:
    """Body of a worker process: sends ("ready", digests), then an answer to every task: ("done", outcome), or
    ("error", message) when it cannot go on.
    """
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    torch.set_num_threads(1)  # more workers use a machine better than more threads
    cv2.setNumThreads(1)
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        try:
            stages = build_stages(setup)
            connection.send(("ready", collect_digests(stages)))
            while True:
                connection.send(("done", process(connection.recv(), stages)))
        except UserError as error:
            connection.send(("error", str(error)))


def _die_with_parent() -> None:
    """On Linux, a kill of the parent takes this process along, so that it cannot meddle with a restarted job."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def stage_settings(stages: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the index tells of the stages."""

    def shown(settings: Mapping[str, Any], hidden: Sequence[str]) -> dict[str, Any]:
        inner = ("device",)  # of an engine: where it runs says nothing of what it makes
        return {k: shown(v, inner) if isinstance(v, Mapping) else v for k, v in settings.items() if k not in hidden}

    return [{"name": name, "settings": shown(config, ("_target_",))} for name, config in stages.items()]
