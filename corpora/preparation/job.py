"""The preparation job: shards of every split, with clips distributed over workers."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from corpora.preparation.clip import FPS, Outcome, SourceClip, WorkItem
from corpora.preparation.sources import Source
from corpora.preparation.stage_runner import StageRunner, earlier_samples, input_digest, without_device
from engine.cluster import make_executor
from engine.config import plain
from engine.errors import UserError
from engine.files import writable
from engine.instantiate import build, target
from engine.processes import Lost
from engine.progress import progress_bar
from engine.settings import ClusterConfig, Limits, set_limits
from engine.shards.writer import SplitWriter, dumps, reject_sample


def prepare(config: DictConfig) -> None:
    """Run the job that `configs/prepare.yaml` describes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("preparation is a single process: start it without torchrun, and set workers=N or executor=ray")
    set_limits(Limits(**config.limits))
    source: Source = build(config.source)
    names = list(config.splits) if config.splits is not None else source.splits
    if not names:
        raise UserError(f"{source.root} has no splits: check source.root")
    listed = {name: source.clips(name)[: config.limit] for name in names}
    stages = chosen_stages(config, source)
    settings = {name: without_device(stage) for name, stage in stages.items()}
    for stage in settings.values():
        del stage["_target_"]
    output = Path(config.output)
    reuse = Path(config.reuse) if config.reuse else None
    clips = Counter[tuple[Path, bool]]()  # number of clips by split folder and rejection
    frames = 0
    times: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))  # by stage: clips, wall-clock and CPU seconds
    ray = ClusterConfig(**config.ray) if config.executor == "ray" else None
    start = partial(StageRunner, stages, config.device, source.symbols)
    with writable(output), make_executor(config.workers, start, config.clip_timeout, ray) as executor:
        digests, fingerprints = executor.details
        features = {"digests": digests, "symbols": source.symbols}
        writers: dict[str, SplitWriter] = {}
        for name, described in listed.items():
            plan = {"split": name, "stages": settings, "clips_per_shard": config.clips_per_shard, **features}
            plan |= {"clips": len(described), "listing": _listing_digest(described)}
            in_place = reuse is not None and (reuse / name).resolve() == (output / name).resolve()
            keys = [clip.key for clip in described]
            writers[name] = SplitWriter(
                output / name, keys, config.clips_per_shard, plan, stages=fingerprints, replace=in_place
            )
        count = sum(len(writer.missing(shard)) for writer in writers.values() for shard in writer.shards)
        items = _remaining_items(source.root, listed, writers, reuse, fingerprints)
        started = time.monotonic()
        for item, outcome in _patient(progress_bar(executor.run(items), count, "clips"), config.patience):
            if outcome.stage:
                reject_sample(item.work, item.info.key, item.info.source, outcome.stage, outcome.reason)
            writers[item.work.parent.name].settle(item.work)
            clips[item.work.parent, bool(outcome.stage)] += 1
            frames += outcome.frames
            for name, seconds in outcome.seconds.items():
                times[name] += (1, *seconds)
        if clips:
            workers = ray.workers if ray else config.workers
            _print_speed(times, clips.total(), frames / FPS, time.monotonic() - started, workers)
    features["stages"] = [{"name": name, "settings": stage} for name, stage in settings.items()]
    for name, writer in writers.items():
        index = writer.finish({"split": name, **features})
        print(
            f"{writer.folder}: {clips[writer.folder, False]} new clips, {clips[writer.folder, True]} rejected; "
            f"complete: {index['clips']} clips, {index['seconds']:.1f} s, {len(index['shards'])} shards, "
            f"rejected: {index['rejected'] or 'none'}"
        )


def _listing_digest(clips: list[SourceClip]) -> str:
    """Return a digest of all source fields of the clips of a split, in order."""
    listing = dumps([input_digest(clip) for clip in clips])
    return hashlib.sha256(listing).hexdigest()[:16]


def _remaining_items(
    root: Path,
    listed: Mapping[str, list[SourceClip]],
    writers: Mapping[str, SplitWriter],
    reuse: Path | None,
    fingerprints: Mapping[str, str],
) -> Iterator[WorkItem]:
    """Yield the clips that are not in the output yet, shard by shard.

    Args:
        root: folder of the source.
        listed: clips by split.
        writers: writer of each split.
        reuse: output folder of an earlier job, whose unchanged tensors are copied. None: nothing is copied.
        fingerprints: see `StageRunner`.
    """
    for name, writer in writers.items():
        described = {clip.key: clip for clip in listed[name]}
        for shard in writer.shards:
            work, keys = writer.begin(shard)
            earlier = earlier_samples(reuse / name, shard, fingerprints) if reuse and keys else {}
            for key in keys:
                yield WorkItem(described[key], root, work, **earlier.get(key, {}))


def _print_speed(times: dict[str, np.ndarray], count: int, duration: float, seconds: float, workers: int) -> None:
    """Print the number of clips, and the wall-clock and CPU time of the workers, for each stage."""
    total = max(sum(wall for _, wall, _ in times.values()), 1e-9)
    print(f"{'stage':<14}{'clips':>8}{'s/clip':>10}{'CPU s/clip':>12}{'share':>8}")
    for name, (clips, wall, processor) in times.items():
        print(f"{name:<14}{clips:>8.0f}{wall / clips:>10.4f}{processor / clips:>12.4f}{wall / total:>8.1%}")
    speed = f"{count / seconds:.2f} clips/s, {duration / seconds:.2f} s of clips per second"
    print(f"{count} clips in {seconds:.1f} s, workers={workers}: {speed}")


def chosen_stages(config: DictConfig, source: Source) -> dict[str, dict[str, Any]]:
    """Return the settings of enabled stages that the source supports."""
    stages = plain(config)["stages"]
    if not stages["decode"]["use"]:
        raise UserError("stages.decode.use=false: this stage is required")
    used = {name: stage for name, stage in stages.items() if stage.pop("use")}
    needs = {name: target(stage["_target_"]).needs for name, stage in used.items()}
    if not source.frames:
        blind = [name for name in used if needs[name]]
        print(f"skipped, as the source has no video: {', '.join(blind)}")
        return {name: stage for name, stage in used.items() if name not in blind}
    for name, stage in used.items():
        if "face" not in used and needs[name] == "face" and stage.get("crop") != "centre":
            raise UserError(
                f"stages.face.use=false, but {name} needs the face: set stages.{name}.use=false too"
                + (f", or stages.{name}.crop=centre" if "crop" in stage else "")
            )
    return used


def _patient(results: Iterable[tuple[WorkItem, Outcome | Lost]], patience: int) -> Iterator[tuple[WorkItem, Outcome]]:
    """Yield clips with their outcomes. Suspected machine faults are held back until a clip without one follows.

    Raises:
        UserError: If `patience` consecutive clips failed in a way of which the machine may be the cause.
    """
    held_back = []
    for item, outcome in results:
        if isinstance(outcome, Lost):
            outcome = Outcome("crash", outcome.reason, machine_fault=True)
        held_back.append((item, outcome))
        if not outcome.machine_fault:
            yield from held_back
            held_back = []
        elif len(held_back) >= patience:
            raise UserError(
                f"{patience} clips in a row failed, the last one ({item.info.source}) in stage {outcome.stage}: "
                f"{outcome.reason}; the clips are probably not the cause and will be retried; raise patience to "
                "allow more failures"
            )
    yield from held_back
