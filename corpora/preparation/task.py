"""One clip is one task: the stages run over it, and its sample goes into the work folder of its shard.

A task has two halves, which may run in two processes: `Pipeline.cut` decodes the clip and takes from its pictures what
the networks read, `Pipeline.encode` runs the networks, over one clip or over many, and writes the samples.
Running a task again, whole or in part, gives the same sample. Tensors that existing shards hold, and whose stage,
networks and settings are unchanged, are taken over (`Previous`).
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save

from corpora.preparation.clip import Encoder, MachineFault, SourceClip, Stage, WorkItem
from engine.config import build, target
from engine.device import pick_device
from engine.errors import UserError
from engine.media.limits import Limits
from engine.shards.reader import VERSION, read_sample
from engine.shards.source import checksum
from engine.shards.writer import dumps, write_sample
from engine.untrusted import parse_json

# Errors that no clip causes: the disk is full or read-only, or the machine is out of file handles.
FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}
LONGEST_REASON = 300


@dataclass(frozen=True)
class Previous:
    """A clip's sample in a shard that exists.

    Attributes:
        tar: the shard. places: offset and size of KEY.json, and of KEY.safetensors.
        stages: by name, the fingerprint of each stage that the shard was made with.
    """

    tar: Path
    places: Sequence[Sequence[int]]
    stages: Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """One clip to prepare. root: of its paths. work: work folder of its shard. previous: its sample, if one exists."""

    clip: SourceClip
    root: Path
    work: Path
    previous: Previous | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a clip.

    Attributes:
        stage, reason: where and why it was rejected; "" if its sample was written.
        machine_fault: the reason may lie in the machine rather than in the clip.
        seconds: by stage, wall-clock and processor time. frames: of the clip, at 25 a second.
    """

    stage: str = ""
    reason: str = ""
    machine_fault: bool = False
    seconds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    frames: int = 0


@dataclass(frozen=True)
class Setup:
    """What the stages are built from: their config by name, the device, the phonemes of the source; how large a file
    may be."""

    stages: Mapping[str, Mapping[str, Any]]
    device: str
    symbols: list[str] | None
    limits: Limits = field(default_factory=Limits)


@dataclass
class Cut:
    """A clip after the first half of its task.

    Attributes:
        clip: without its pictures; None if it was rejected.
        outcome: of a rejected clip. seconds: as in `Outcome`.
        encoders: names of the stages that are still to run. facts: of stages whose results were taken over.
    """

    task: Task
    clip: WorkItem | None = None
    outcome: Outcome | None = None
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    encoders: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class Pipeline:
    """The stages in order: first those without a network of their own, then the encoders.

    Args:
        fingerprints: of a pipeline with networks; this one can then `cut` alone, without any. None: it does both.

    Attributes:
        stages: by name. digests: of the weights of their networks. fingerprints: by stage, eight hex digits that change
            with its settings, its weights, or those of the earlier stages that change pictures or sound.

    Raises:
        UserError: a setting is wrong, or weights or a package are missing.
    """

    def __init__(self, setup: Setup, fingerprints: Mapping[str, str] | None = None) -> None:
        offered = {"device": pick_device(setup.device) if fingerprints is None else None, "symbols": setup.symbols}
        self.stages: dict[str, Stage] = {}
        self.digests: dict[str, str] = {}
        self.fingerprints: dict[str, str] = dict(fingerprints or {})
        before: list[Any] = []
        for name, config in setup.stages.items():
            kind = target(config["_target_"])
            parameters = inspect.signature(kind).parameters
            extra = {key: value for key, value in offered.items() if key in parameters}
            without = {} if fingerprints is None else dict.fromkeys(getattr(kind, "settings", ()))
            stage = self.stages[name] = build(OmegaConf.create(dict(config) | without), **extra)
            if fingerprints is not None:
                continue
            digests, symbols = stage.digests(), setup.symbols if "symbols" in extra else None
            self.digests |= digests
            made_by = [name, _without_device(config), digests, symbols]
            self.fingerprints[name] = hashlib.sha256(dumps([*before, made_by])).hexdigest()[:8]
            if not stage.reusable:
                before.append(made_by)

    def process(self, task: Task) -> Outcome:
        """Run the stages over one clip and write its sample. Whatever is wrong with a clip rejects that clip alone.

        Raises:
            UserError: the disk is full, or something else that no clip causes.
        """
        return self.encode([self.cut(task)])[0]

    @torch.inference_mode()
    def cut(self, task: Task) -> Cut:
        """The first half of a task: all that needs the pictures, and no network of an encoder.

        Raises:
            UserError: as `process`.
        """
        clip = WorkItem(task.clip, task.root)
        try:
            return self._cut(clip, Cut(task, clip))
        finally:
            clip.close()

    def _cut(self, clip: WorkItem, cut: Cut) -> Cut:
        unchanged = set()
        if cut.task.previous:
            unchanged, cut.facts = self._take_over(clip, cut.task, cut.seconds)
        needed = {stage.needs for name, stage in self.stages.items() if stage.reusable and name not in unchanged}
        for name, stage in self.stages.items():
            if stage.needs == "frames" and clip.info.video is None:
                continue
            if name in unchanged and (stage.reusable or stage.needs not in {"", *needed}):
                continue
            encoder = isinstance(stage, Encoder)
            cut.encoders += [name] if encoder else []
            start = _clocks()
            try:
                stage.cut(clip) if encoder else stage(clip)
            except Exception as error:
                cut.seconds[name] = _since(start)
                return Cut(cut.task, None, _rejection(name, error, clip, cut.seconds))
            cut.seconds[name] = _since(start)
        clip.frames = clip.track = None
        return cut

    @torch.inference_mode()
    def encode(self, cuts: Sequence[Cut]) -> list[Outcome]:
        """The second half of tasks: run the encoders over all clips together, and write the samples.

        Raises:
            UserError: as `process`.
        """
        done = [cut.outcome for cut in cuts]
        for name, stage in self.stages.items():
            at = [i for i, cut in enumerate(cuts) if done[i] is None and name in cut.encoders]
            for i, error, seconds in self._encode(stage, [cuts[i].clip for i in at], at) if at else ():
                spent = cuts[i].seconds
                spent[name] = tuple(map(sum, zip(spent[name], seconds)))
                if error is not None:
                    done[i] = _rejection(name, error, cuts[i].clip, spent)
        return [outcome or self._write(cut) for outcome, cut in zip(done, cuts)]

    def _encode(self, stage: Encoder, clips: list[WorkItem], at: list[int]) -> list[tuple[int, Exception | None, Any]]:
        """Encode clips together, or one by one where one of them makes that fail: (at, error, seconds) of each."""
        start = _clocks()
        try:
            stage.encode(clips)
        except Exception as error:
            if len(clips) == 1:
                return [(at[0], error, _since(start))]
            return [each for i, clip in zip(at, clips) for each in self._encode(stage, [clip], [i])]
        seconds = tuple(value / len(clips) for value in _since(start))
        return [(i, None, seconds) for i in at]

    def _write(self, cut: Cut) -> Outcome:
        start, task, clip = _clocks(), cut.task, cut.clip
        facts = {"key": task.clip.key, **clip.facts, **cut.facts, "input": input_digest(task.clip)}
        members = {"json": dumps(facts | {"text": facts["text"] or ""})}  # readers want a string
        members["safetensors"] = save({name: tensor.contiguous() for name, tensor in clip.tensors.items()})
        write_sample(task.work, task.clip.key, members | clip.files)
        cut.seconds["write"] = _since(start)
        return Outcome(seconds=cut.seconds, frames=clip.length)

    def _take_over(
        self, clip: WorkItem, task: Task, seconds: dict[str, tuple[float, float]]
    ) -> tuple[set[str], dict[str, Any]]:
        """Put the tensors of existing shards into a clip; returns the names of unchanged stages, and their facts."""
        start, previous = _clocks(), task.previous
        held = {
            name: stage for name, stage in self.stages.items() if previous.stages.get(name) == self.fingerprints[name]
        }
        with previous.tar.open("rb", buffering=0) as file:
            wanted = {name for stage in held.values() for name in stage.tensors}
            facts, tensors = read_sample(file, previous.places, wanted)
        if facts.get("input") != input_digest(task.clip):
            return set(), {}
        clip.tensors |= tensors
        seconds["reuse"] = _since(start)
        return set(held), {name: facts[name] for stage in held.values() for name in stage.facts}


def previous_samples(folder: Path, shard: int) -> dict[str, Previous]:
    """By key, the samples of a shard of an existing split; {} if there is no such shard, or a damaged one."""
    tar, sidecar = (folder / f"{shard:06d}{suffix}" for suffix in (".tar", ".json"))
    try:
        about = parse_json(sidecar.read_bytes(), sidecar)
        if about["version"] != VERSION or checksum(tar) != about["crc32"]:
            return {}
        return {
            each["key"]: Previous(tar, (each["members"]["json"], each["members"]["safetensors"]), about["stages"])
            for each in about["samples"]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def input_digest(clip: SourceClip) -> str:
    """Eight hex digits of what the source says of a clip; the contents of its files do not count."""
    return hashlib.sha256(dumps(asdict(clip))).hexdigest()[:8]


def raise_if_machine_fault(error: BaseException) -> None:
    """
    Raises:
        UserError: the error, or one that caused it, is none that a clip can cause.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in FATAL:
            raise UserError(f"{cause.strerror} ({error}); finished clips are kept, run the same command to continue")
        cause = cause.__cause__ or cause.__context__


def stage_settings(stages: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Names and settings of the stages for the index."""
    return [
        {"name": name, "settings": {k: v for k, v in _without_device(config).items() if k != "_target_"}}
        for name, config in stages.items()
    ]


def _without_device(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without devices: where a network runs does not decide what it makes."""
    return {
        name: _without_device(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name != "device"
    }


def _clocks() -> tuple[float, float]:
    """Wall-clock time, and processor time of this process and its finished children."""
    return time.perf_counter(), sum(os.times()[:4])


def _since(start: tuple[float, float]) -> tuple[float, float]:
    wall, processor = _clocks()
    return wall - start[0], processor - start[1]


def _rejection(stage: str, error: Exception, clip: WorkItem, seconds: Mapping[str, tuple[float, float]]) -> Outcome:
    """The outcome of a clip that a stage refuses or fails at.

    Raises:
        UserError: no clip can cause the error.
    """
    raise_if_machine_fault(error)
    known = isinstance(error, UserError)
    reason = str(error) if known else f"{type(error).__name__}: {error}"
    return Outcome(stage, _normalise_reason(reason, clip), isinstance(error, MachineFault) or not known, seconds)


def _normalise_reason(reason: str, clip: WorkItem) -> str:
    """One line that is the same whenever and wherever the clip fails."""
    for folder in (clip.root, clip.unpacked.name if clip.unpacked else clip.root):
        reason = reason.replace(f"{folder}/", "")
    reason = " ".join(reason.split())
    reason = re.sub(r"0x[0-9a-fA-F]{6,}", "0x", reason)
    return reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
