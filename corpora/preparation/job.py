"""The whole job of one process: its shards of every split, with clips distributed over its workers."""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from corpora.preparation.clip import FPS, SourceClip
from corpora.preparation.cluster import RayConfig, RayPool
from corpora.preparation.executor import ProcessPool
from corpora.preparation.sources import Source
from corpora.preparation.task import Outcome, Setup, Task, previous_samples, stage_settings
from engine.config import build, target
from engine.errors import UserError
from engine.media.limits import Limits
from engine.progress import track
from engine.settings import require_choice
from engine.shards.writer import SplitWriter, dumps, reject_sample

EXECUTORS = ("processes", "ray")


@dataclass
class Timing:
    """By stage, the seconds of the workers on the clock and of the processor, and the number of clips that it saw."""

    wall: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    processor: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    clips: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    frames: int = 0

    def add(self, outcome: Outcome) -> None:
        self.frames += outcome.frames
        for stage, (wall, processor) in outcome.seconds.items():
            self.wall[stage] += wall
            self.processor[stage] += processor
            self.clips[stage] += 1

    def table(self) -> str:
        total = max(sum(self.wall.values()), 1e-9)
        lines = [f"{'stage':<14}{'clips':>8}{'s/clip':>10}{'CPU s/clip':>12}{'share':>8}"]
        for stage, wall in self.wall.items():
            count = self.clips[stage]
            lines.append(
                f"{stage:<14}{count:>8}{wall / count:>10.4f}{self.processor[stage] / count:>12.4f}{wall / total:>8.1%}"
            )
        return "\n".join(lines)


@dataclass
class _Split:
    """A split at work.

    Attributes:
        previous: folder of shards whose unchanged tensors are taken over, or None.
        left: by shard, the number of clips that are to be done. new, rejected: clips that this run made and rejected.
    """

    name: str
    writer: SplitWriter
    clips: Mapping[str, SourceClip]
    about: dict[str, Any]
    previous: Path | None = None
    left: dict[int, int] = field(default_factory=dict)
    new: int = 0
    rejected: int = 0


def prepare(config: DictConfig) -> None:
    """Run the job that `configs/prepare.yaml` describes.

    Raises:
        UserError: a wrong setting; a source, weights or a package that are missing; a disk that is full; or one
            unforeseen failure after the other.
    """
    rank, world = place(config)
    _check(config)
    limits = Limits(**config.limits)
    source: Source = build(config.source)
    names = list(config.splits) if config.splits is not None else source.splits()
    if not names:
        raise UserError(f"{source.root} has no splits: is source.root right?")
    listed = {name: source.clips(name)[: config.limit] for name in names}
    stages = chosen_stages(config, source)
    setup = Setup(stages, config.device, source.symbols, limits)
    with _pool(config, setup) as pool:
        splits = [_open(config, name, listed[name], setup, pool, rank, world) for name in names]
        started = time.monotonic()
        timing = _run(pool, splits, source.root, config.patience)
        _report(timing, splits, time.monotonic() - started, config.workers)
    for split in splits:
        index = split.writer.finish(split.about)
        made = f"{split.new} clips made now, {split.rejected} rejected"
        if index is None:
            print(f"{split.writer.folder}: {made}; the index comes with the last process")
        else:
            print(
                f"{split.writer.folder}: {made}; complete: {index['clips']} clips, {index['seconds']:.1f} s, "
                f"{len(index['shards'])} shards, rejected: {index['rejected'] or 'none'}"
            )


def _pool(config: DictConfig, setup: Setup) -> ProcessPool | RayPool:
    """What runs the tasks: processes of this machine, or a Ray cluster."""
    if config.executor == "processes":
        return ProcessPool(config.workers, setup, config.clip_timeout)
    return RayPool(config.workers, setup, config.clip_timeout, RayConfig(**config.ray))


def place(config: DictConfig) -> tuple[int, int]:
    """(rank, world size) of this process: as set, else from torchrun's environment."""
    rank = int(os.environ.get("RANK", 0)) if config.rank is None else config.rank
    world = int(os.environ.get("WORLD_SIZE", 1)) if config.world_size is None else config.world_size
    if not 0 <= rank < world:
        raise UserError(f"rank={rank} must be in 0..world_size-1, and world_size is {world}")
    return rank, world


def _check(config: DictConfig) -> None:
    require_choice("executor", config.executor, EXECUTORS)
    if config.executor == "ray" and place(config)[1] > 1:
        raise UserError("executor=ray: one process is enough, the cluster does the work; start it without torchrun")
    for name in ("clips_per_shard", "workers", "clip_timeout", "patience"):
        if config[name] < 1:
            raise UserError(f"{name}={config[name]}: give 1 or more")
    if config.limit is not None and config.limit < 1:
        raise UserError(f"limit={config.limit}: give 1 or more")


def chosen_stages(config: DictConfig, source: Source) -> dict[str, dict[str, Any]]:
    """Settings by stage of those that are used and for which the source has what they need."""
    stages = OmegaConf.to_container(config, resolve=True)["stages"]
    if not stages["decode"]["use"]:
        raise UserError("stages.decode.use=false: without it there is nothing to prepare")
    used = {name: stage for name, stage in stages.items() if stage.pop("use")}
    if not source.frames:
        blind = [name for name, stage in used.items() if target(stage["_target_"]).needs == "frames"]
        print(f"skipped, as the source has no pictures: {', '.join(blind)}")
        return {name: stage for name, stage in used.items() if name not in blind}
    for name in ("crops", "lip", "face_identity", "expression", "motion", "portraits") if "face" not in used else ():
        if name in used and used[name].get("crop") != "centre":
            raise UserError(
                f"stages.face.use=false, but {name} needs the face: set stages.{name}.use=false too"
                + (f", or stages.{name}.crop=centre" if "crop" in used[name] else "")
            )
    return used


def _open(
    config: DictConfig,
    name: str,
    clips: list[SourceClip],
    setup: Setup,
    pool: ProcessPool | RayPool,
    rank: int,
    world: int,
) -> _Split:
    listing = hashlib.sha256(dumps([[clip.key, clip.source, clip.text] for clip in clips])).hexdigest()[:16]
    about = {"split": name, "stages": stage_settings(setup.stages), "digests": pool.digests, "symbols": setup.symbols}
    plan = {"clips_per_shard": config.clips_per_shard, "clips": len(clips), "listing": listing, **about}
    plan["stages"] = {stage["name"]: stage["settings"] for stage in about["stages"]}
    keys = [clip.key for clip in clips]
    folder, previous = Path(config.output) / name, Path(config.reuse) / name if config.reuse else None
    replace = previous is not None and previous.resolve() == folder.resolve()
    writer = SplitWriter(folder, keys, config.clips_per_shard, plan, "motion", rank, world, pool.fingerprints, replace)
    return _Split(name, writer, {clip.key: clip for clip in clips}, about, previous)


def _run(pool: ProcessPool | RayPool, splits: list[_Split], root: Path, patience: int) -> Timing:
    """Prepare what is missing and pack every shard that is full."""
    todo: list[tuple[_Split, int, list[str]]] = []
    for split in splits:
        for shard in split.writer.mine:
            keys = split.writer.missing(shard)
            if keys:
                todo.append((split, shard, keys))
                split.left[shard] = len(keys)
            elif not split.writer.is_made(shard):  # killed between its last clip and its packing
                split.writer.pack(shard)
    owner = {}

    def tasks() -> Iterator[Task]:
        for split, shard, keys in todo:
            work = split.writer.begin(shard)
            owner[work] = split, shard
            previous = previous_samples(split.previous, shard) if split.previous else {}
            for key in keys:
                yield Task(split.clips[key], root, work, previous.get(key))

    def settle(task: Task, outcome: Outcome) -> None:
        split, shard = owner[task.work]
        if outcome.stage:
            reject_sample(task.work, task.clip.key, task.clip.source, outcome.stage, outcome.reason)
        split.new, split.rejected = split.new + (not outcome.stage), split.rejected + bool(outcome.stage)
        split.left[shard] -= 1
        if not split.left[shard]:
            split.writer.pack(shard)

    timing, held = Timing(), []  # held: machine faults in a row, not yet written down
    for task, outcome in track(pool.run(tasks()), sum(len(keys) for _, _, keys in todo), "clips"):
        timing.add(outcome)
        held.append((task, outcome))
        if not outcome.machine_fault:
            for pair in held:
                settle(*pair)
            held = []
        elif len(held) >= patience:
            raise UserError(
                f"{patience} clips in a row failed, the last one ({task.clip.source}) in stage {outcome.stage}: "
                f"{outcome.reason}; the clips are probably not the cause and will be tried again; raise patience to "
                "allow more failures"
            )
    for pair in held:
        settle(*pair)
    return timing


def _report(timing: Timing, splits: list[_Split], seconds: float, workers: int) -> None:
    done = sum(split.new + split.rejected for split in splits)
    if done:
        print(timing.table())
        speed = f"{done / seconds:.2f} clips/s, {timing.frames / FPS / seconds:.2f} s of clips a second"
        print(f"{done} clips in {seconds:.1f} s with {workers} worker{'s'[: workers - 1]}: {speed}")
