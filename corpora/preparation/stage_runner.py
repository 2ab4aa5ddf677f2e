"""Runs the preparation stages of a clip and writes its sample to the work folder of its shard.

Results are deterministic. Tensors of an earlier shard whose stage, networks and settings are unchanged are copied from
it.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import torch
from omegaconf import OmegaConf
from safetensors.torch import save

from corpora.preparation.clip import MachineFault, Outcome, SourceClip, Stage, WorkItem
from engine.device import pick_device, use_gpu
from engine.errors import UserError
from engine.files import checksum, write_failure
from engine.instantiate import build, target
from engine.processes import Work
from engine.shards.reader import VERSION, read_sample
from engine.shards.writer import dumps, write_sample
from engine.untrusted import parse_json
from hicodit.data import FACE_DETECTOR

NO_HANDLES = (errno.EMFILE, errno.ENFILE)  # errors that, like a full disk, no clip can cause
LONGEST_REASON = 300


class StageRunner(Work[WorkItem, Outcome]):
    """Runs all preparation stages in order. Each worker process has one.

    Args:
        stages: settings of the stages by name.
        device: device of the networks.
        symbols: phonemes of the source.
        number: index of the worker process, which uses one thread and one of the GPUs. None: not a worker.

    Attributes:
        stages: stages by name.
        digests: digests of the weights of their networks.
        fingerprints: hash of each stage (eight hex digits) that depends on its settings and weights, and on those of
            earlier stages that modify frames or audio.
        details: (digests, fingerprints).
    """

    def __init__(
        self,
        stages: Mapping[str, Mapping[str, Any]],
        device: str,
        symbols: list[str] | None,
        number: int | None = None,
    ) -> None:
        if number is not None:
            torch.set_num_threads(1)
            cv2.setNumThreads(1)
            use_gpu(number)  # of the stages and of the engines in them
        offered = {"device": pick_device(device), "symbols": symbols}
        self.stages: dict[str, Stage] = {}
        self.digests: dict[str, str] = {}
        self.fingerprints: dict[str, str] = {}
        self.details = self.digests, self.fingerprints
        before = []
        for name, config in stages.items():
            kind = target(config["_target_"])
            parameters = inspect.signature(kind).parameters
            extra = {key: value for key, value in offered.items() if key in parameters}
            stage = self.stages[name] = build(OmegaConf.create(dict(config)), **extra)
            digests = stage.digests()
            self.digests |= digests
            # The detector follows from the settings; shards in which it was not recorded yet remain valid.
            weights = {feature: digest for feature, digest in digests.items() if feature != FACE_DETECTOR}
            made_by = [name, without_device(config), weights, symbols if "symbols" in extra else None]
            self.fingerprints[name] = hashlib.sha256(dumps([*before, made_by])).hexdigest()[:8]
            if not stage.reusable:
                before.append(made_by)

    def _needed(self, clip: WorkItem) -> Iterator[tuple[str, Stage]]:
        """Yield the stages that a clip needs: not those whose results are copied, unless other stages read theirs."""
        computed = (stage for name, stage in self.stages.items() if stage.reusable and name not in clip.unchanged)
        frames_needed = any(stage.needs for stage in computed)
        for name, stage in self.stages.items():
            skipped = name in clip.unchanged and (stage.reusable or (stage.needs and not frames_needed))
            if not skipped and (not stage.needs or clip.info.video is not None):
                yield name, stage

    @torch.inference_mode()
    def run(self, clip: WorkItem) -> Outcome:
        """Run all stages on a clip and write its sample. The outcome of a rejected clip contains the reason."""
        try:
            if clip.unchanged:
                self._copy_unchanged(clip)
            for name, stage in self._needed(clip):
                if (outcome := _run(name, stage, clip)) is not None:
                    return outcome
        finally:
            clip.close()
        with _timed("write", clip):
            facts = {"key": clip.info.key, **clip.facts, **clip.earlier_facts, "input": input_digest(clip.info)}
            members = {"json": dumps(facts | {"text": facts["text"] or ""})}  # readers want a string
            members["safetensors"] = save({name: tensor.contiguous() for name, tensor in clip.tensors.items()})
            write_sample(clip.work, clip.info.key, members)
        return Outcome(seconds=clip.seconds, frames=clip.length)

    def _copy_unchanged(self, clip: WorkItem) -> None:
        """Copy unchanged tensors of an earlier shard. If the description of the clip has changed, nothing is copied."""
        with _timed("reuse", clip), clip.shard.open("rb", buffering=0) as file:
            stages = [self.stages[name] for name in clip.unchanged]
            facts, tensors = read_sample(file, clip.members, {name for stage in stages for name in stage.tensors})
            if facts.get("input") == input_digest(clip.info):
                clip.tensors |= tensors
                clip.earlier_facts = {name: facts[name] for stage in stages for name in stage.facts}
                return
        clip.unchanged = frozenset()
        del clip.seconds["reuse"]  # nothing was reused


def earlier_samples(folder: Path, shard: int, fingerprints: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return for each key the fields of a `WorkItem` that refer to its sample in a shard of an existing split.

    Return {} if there is no such shard, or it is damaged.
    """
    tar = folder / f"{shard:06d}.tar"
    sidecar = folder / f"{shard:06d}.json"
    try:
        listing = parse_json(sidecar.read_bytes(), sidecar)
        if listing["version"] != VERSION or checksum(tar) != listing["crc32"]:
            return {}
        unchanged = frozenset(name for name, value in fingerprints.items() if listing["stages"].get(name) == value)
        samples = {each["key"]: each["members"] for each in listing["samples"]}
        return {
            key: {"shard": tar, "members": (members["json"], members["safetensors"]), "unchanged": unchanged}
            for key, members in samples.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def input_digest(clip: SourceClip) -> str:
    """Return eight hex digits of a digest of a clip's source fields. The contents of its files are not included."""
    fields = {name: value for name, value in asdict(clip).items() if name != "lag" or value}
    return hashlib.sha256(dumps(fields)).hexdigest()[:8]


def without_device(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without devices, which do not affect the results."""
    return {
        name: without_device(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name != "device"
    }


@contextmanager
def _timed(name: str, clip: WorkItem) -> Iterator[None]:
    """Measure wall-clock time and CPU time of a block, including finished child processes."""
    start = time.perf_counter(), sum(os.times()[:4])
    yield
    wall, processor = clip.seconds.get(name, (0.0, 0.0))
    clip.seconds[name] = wall + time.perf_counter() - start[0], processor + sum(os.times()[:4]) - start[1]


def _run(name: str, stage: Stage, clip: WorkItem) -> Outcome | None:
    """Run a stage. Return the outcome of a clip that fails; an error that no clip can cause ends the job."""
    with _timed(name, clip):
        try:
            stage(clip)
        except Exception as error:
            if (failure := write_failure(error, *NO_HANDLES)) is not None:
                advice = "finished clips are kept, run the same command to continue"
                raise UserError(f"{failure.strerror} ({error}); {advice}") from error
            known = isinstance(error, UserError)
            reason = _one_line(str(error) if known else f"{type(error).__name__}: {error}", clip)
            return Outcome(name, reason, isinstance(error, MachineFault) or not known, clip.seconds)
    return None


def _one_line(reason: str, clip: WorkItem) -> str:
    """Return a reason as one line that is the same whenever and wherever the clip fails."""
    for folder in (clip.root, clip.unpacked.name if clip.unpacked else clip.root):
        reason = reason.replace(f"{folder}/", "")
    reason = re.sub(r"0x[0-9a-fA-F]{6,}", "0x", " ".join(reason.split()))
    return reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
