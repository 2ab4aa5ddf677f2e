"""Measurement of clips, in an evaluation and in the trainer's validation.

An evaluation uses several processes (`engine.evaluation.workers`) and reuses cached measurements, which are keyed by
the contents of the files.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from engine.errors import UserError, reason_of
from engine.evaluation.clips import TRUTH, Clip
from engine.files import atomic_output
from engine.metrics.metric import Metric, Take, wave_of
from engine.progress import progress_bar

Row = dict[str, Any]  # a single measurement
Takes = tuple[Mapping[str, Take], Take]  # takes of one clip, by system, and the ground truth


@dataclass
class Results:
    """Results of a measurement run."""

    rows: dict[str, dict[str, dict[str, Row]]] = field(default_factory=dict)  # measurements by metric, system and clip
    failed: list[dict[str, str]] = field(default_factory=list)  # `clip`, `system`, `where` (metric or file), `why`
    # Lengths of the takes in seconds, by system and clip.
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # reason why a metric has no measurements
    seconds: dict[str, float] = field(default_factory=dict)  # elapsed seconds by metric, including loading its network
    cached: dict[str, int] = field(default_factory=dict)  # number of cached measurements by metric


@lru_cache(4096)
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def file_digest(path: Path | None) -> str | None:
    """Return a digest of the contents of a file; None if there is none."""
    if path is None or not path.is_file():
        return None
    state = path.stat()
    return _digest(path, state.st_size, state.st_mtime_ns)


def digest_of(values: Sequence[Any]) -> str:
    """Return a digest of plain values. Paths among them are replaced by the contents of their files."""
    return hashlib.blake2b(json.dumps(values, default=file_digest).encode(), digest_size=16).hexdigest()


def result_file(cache: Path, metric: Metric, take: Take, truth: Take) -> Path:
    """Return the cache path of the measurement of a take. Its name is a digest of all inputs."""

    def inputs(one: Take) -> list[Any]:
        return [getattr(one, name) for name in metric.inputs]

    states = [(file.name, file.stat()) for file in metric.files]
    networks = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    about = [metric.name, metric.version, metric.protocol, networks, inputs(take)]
    about += [truth.text, take.language, truth.about, *([inputs(truth)] if metric.needs_truth else [])]
    return cache / metric.name / f"{digest_of(about)}.npz"


def _store(path: Path, row: Row) -> None:
    arrays = {name: value for name, value in row.items() if isinstance(value, np.ndarray)}
    plain = json.dumps({name: value for name, value in row.items() if name not in arrays})
    with atomic_output(path) as partial, partial.open("wb") as file:
        np.savez(file, plain=np.array(plain), **arrays)


def _load(path: Path) -> Row | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            row = json.loads(str(file["plain"]))
            return row | {name: file[name] for name in file.files if name != "plain"}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # missing or damaged: measure again
        return None


_loaded: list[Metric] = []  # the current metric of this process


def _load_once(metric: Metric) -> Metric:
    if metric not in _loaded:
        _loaded.clear()  # free memory before loading the next network
        own = replace(metric)  # the metric object of the caller stays unloaded
        own.load()
        _loaded.append(own)
    return _loaded[0]


def measure_clip(metric: Metric, cache: Path | None, clip: Takes) -> tuple[dict[str, Row | str], int]:
    """Return the measurement, or the reason for its absence, by system, and the number of cache hits."""
    takes, truth = clip
    out = {}
    found = 0
    for name, take in takes.items():
        try:
            path = None if cache is None else result_file(cache, metric, take, truth)
            row = None if path is None else _load(path)
            if row is None:
                row = _load_once(metric).measure(take, truth)
                if not all(np.isfinite(row[figure]).all() for figure in metric.figures if figure in row):
                    raise UserError("the result is not finite")
                if path is not None:
                    _store(path, row)
            else:
                found += 1
            out[name] = row
        except Exception as error:  # may be of a package; the other clips continue
            out[name] = reason_of(error)
    return out, found


def check_files(take: Take) -> float | str:
    """Return the length of a take in seconds, or the reason why its files cannot be used."""
    if take.audio is None:
        return "there is no audio or video file of that name"
    if take.source is not None and not take.source.is_file():
        return f"no such file: {take.source}"
    try:
        return len(wave_of(take.audio, 16_000)) / 16_000
    except UserError as error:
        return str(error)


def measure(
    clips: Sequence[Clip],
    metrics: Iterable[Metric],
    cache: Path | None = None,
    true_row: bool = True,
    map_function: Callable = map,
) -> Results:
    """Measure every take of every clip.

    A clip whose files cannot be read is skipped for that system, and for all systems if its ground-truth files cannot
    be read.

    Args:
        clips: outputs of the systems and the ground truth; audio is a file or a waveform in memory.
        metrics: each is loaded once per process.
        cache: folder of cached measurements, which are keyed by the contents of the files. None disables the cache, as
            for waveforms in memory.
        true_row: whether to measure the ground truth as a system named `TRUTH`. Otherwise it is read only by metrics
            that compare with it.
        map_function: `map`, or the method of `engine.evaluation.workers.Workers`, which measures in several processes.
    """
    results = Results()
    try:
        _measure_all(clips, metrics, cache, true_row, map_function, results)
    finally:
        _loaded.clear()  # free the network of the last metric
    return results


def _measure_all(
    clips: Sequence[Clip],
    metrics: Iterable[Metric],
    cache: Path | None,
    true_row: bool,
    map_function: Callable,
    results: Results,
) -> None:
    """Fill `results`."""
    good = _readable(clips, results, map_function, true_row)
    for metric in metrics:
        start = time.monotonic()
        name = metric.name
        try:
            metric.check()
            works = []
            without = (TRUTH,) if metric.outputs_only else ()
            for clip, takes in good:
                own = {n: take for n, take in takes.items() if n not in without and metric.applies(take)}
                works.append((own, clip.truth))
            if not any(takes for takes, _ in works):  # such as video metrics of systems without video
                continue
            calls = map if metric.device.startswith("cuda") and not metric.parallel else map_function
            done = progress_bar(calls(partial(measure_clip, metric, cache), works), len(works), f"{name} clips")
            measured = [(clip.id, *outcome) for (clip, _), outcome in zip(good, done, strict=True)]
        except UserError as error:
            results.missing[name] = str(error)
            continue
        rows = {}
        reasons = []
        for clip, found, _ in measured:
            for system, row in found.items():
                if isinstance(row, str):
                    reasons.append({"clip": clip, "system": system, "where": name, "why": row})
                else:
                    rows.setdefault(system, {})[clip] = row
        if not rows:
            results.missing[name] = reasons[0]["why"]
            continue
        results.failed += reasons
        true = rows.get(TRUTH, {})
        truths = {clip.id: clip.truth for clip in clips}
        results.rows[name] = {system: metric.finish(own, true, truths) for system, own in rows.items()}
        results.seconds[name] = time.monotonic() - start
        results.cached[name] = sum(found for *_, found in measured)


def _readable(
    clips: Sequence[Clip], results: Results, map_function: Callable, true_row: bool
) -> list[tuple[Clip, dict[str, Take]]]:
    """Return the clips, restricted to takes whose files can be read. With `true_row`, the ground truth is among the
    takes.

    Waveforms in memory are not checked.
    """
    if not true_row:
        return [(clip, dict(clip.takes)) for clip in clips]
    pairs = [(clip, name, take) for clip in clips for name, take in {TRUTH: clip.truth, **clip.takes}.items()]
    for (clip, name, _), found in zip(pairs, map_function(check_files, [take for _, _, take in pairs])):
        if isinstance(found, str):
            results.failed.append({"clip": clip.id, "system": name, "where": "file", "why": found})
        else:
            results.lengths.setdefault(name, {})[clip.id] = found
    good = []
    for clip in clips:
        readable = {n: t for n, t in clip.takes.items() if clip.id in results.lengths.get(n, ())}
        if clip.id in results.lengths.get(TRUTH, ()) and (readable or not clip.takes):
            good.append((clip, {TRUTH: clip.truth, **readable}))
    if not good:
        first = "the first: {clip} ({system}): {why}".format(**results.failed[0])
        raise UserError(f"none of the {len(clips)} clips can be measured; {first}")
    return good
