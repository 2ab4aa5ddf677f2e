"""Generation of a model's outputs for the clips of an evaluation. Existing outputs are kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.cluster import make_executor
from engine.device import pick_device
from engine.errors import UserError, printable, reason_of
from engine.evaluation.clips import Clip, find_take, system_facts
from engine.evaluation.measure import digest_of, file_digest
from engine.files import write_json
from engine.hub import release_folder
from engine.media.audio import write_wav
from engine.media.video import write_video
from engine.metrics.metric import FPS
from engine.processes import Lost, Work
from engine.progress import progress_bar
from engine.settings import ClusterConfig
from engine.untrusted import read_json

ALL_BATCHES = slice(None)


class OutputGenerator(Work[slice, bool]):
    """Writes a subset of the batches of missing outputs, in a process with its own device.

    Args:
        write: `write(device, chosen=batches)` writes the missing outputs of a slice of the batches.
        device: name of the device, as for `pick_device`.
        index: GPU index of the process.
    """

    def __init__(self, write: Callable[..., None], device: str, index: int) -> None:
        self.write = write
        self.device = str(pick_device(device, index))

    def run(self, batches: slice) -> bool:
        self.write(self.device, chosen=batches)
        return True


def write_on_devices(
    write: Callable[..., None], device: str, devices: int = 1, ray: ClusterConfig | None = None
) -> None:
    """Write missing outputs with one process per device, or on a Ray cluster. The batches equal those of a single
    process.

    If a process dies, another process continues its batches, skipping the existing files.

    Args:
        write: see `OutputGenerator`. It is pickled.
        device: name of the device, as for `pick_device`.
        devices: number of processes.
        ray: the cluster to use instead of processes.
    """
    if devices == 1 and not ray:
        write(str(pick_device(device)))
        return
    count = ray.workers if ray else devices
    with make_executor(count, partial(OutputGenerator, write, device), ray=ray) as executor:
        for batches, result in executor.run([slice(start, None, count) for start in range(count)]):
            if isinstance(result, Lost):
                print(f"failed: part {batches.start + 1} of {count} of the clips: {result.reason}", file=sys.stderr)


def write_facts(
    folder: Path,
    model: str,
    weights: str | Path,
    codecs: Mapping[str, str | Path | None] | None = None,
    **facts: Any,
) -> None:
    """Write FOLDER/system.json, which describes how the outputs in the folder were generated.

    Args:
        weights: release folder of the model.
        codecs: releases that replace its codecs.

    Raises:
        UserError: If the folder contains outputs generated in another way.
    """
    place = release_folder(weights)
    new = {
        "model": model,
        "weights": place.name,
        "digest_of_weights": file_digest(place / "model.safetensors"),
        **facts,
    }
    for name, source in (codecs or {}).items():
        if source is not None:
            new[f"digest_of_{name}"] = file_digest(release_folder(source) / "model.safetensors")
    has_outputs = any(path.suffix in (".wav", ".mkv") for path in folder.rglob("*"))
    if has_outputs and (old := system_facts(folder)) and old != json.loads(json.dumps(new)):
        raise UserError(
            f"{folder} contains outputs generated with other settings or by an earlier version: choose another "
            "output=, or delete that folder"
        )
    write_json(folder / "system.json", new)


def write_missing(
    clips: Sequence[Clip],
    folder: Path,
    batch_size: int,
    inputs: Callable[[int, Clip], Sequence[Path | str | int | None]],
    write: Callable[[Sequence[tuple[int, Clip]]], None],
    length: Callable[[Clip], float] = lambda clip: 0.0,
    chosen: slice = ALL_BATCHES,
) -> None:
    """Call `write` with batches of (index, clip) whose output is missing. A clip that fails is reported and skipped.

    Batches are formed from all clips, so that they do not depend on the number of processes or on interruptions.
    FOLDER/inputs.json stores a digest of the inputs of each output.

    Args:
        inputs: returns the files, texts and seeds that the output of a clip depends on, given its index.
        write: writes the files of a batch to `folder`, the audio last; see `write_take`.
        length: returns the length of a clip. Clips of similar length share a batch.
        chosen: slice of the batches to write.

    Raises:
        UserError: If an existing output was generated from other inputs.
    """
    place = folder / "inputs.json"
    waiting = set()
    known = read_json(place) if place.is_file() else {}
    for i, clip in enumerate(clips):
        state = digest_of(inputs(i, clip))
        take = find_take(folder, clip.id)
        if take.audio in (None, take.video):  # no output, or a video without its audio
            waiting.add(i)
        elif known.get(clip.id, state) != state:
            where = f"{folder} contains an output of {clip.id} for other files, text or seed"
            raise UserError(f"{where}: choose another output=, or delete this one")
        known[clip.id] = state
    write_json(place, known)
    order = sorted(enumerate(clips), key=lambda item: length(item[1]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = [[item for item in batch if item[0] in waiting] for batch in batches[chosen]]
    batches = [batch for batch in batches if batch]
    for batch in progress_bar(batches, len(batches), "batches"):
        write_or_report(write, batch)


def write_or_report(write: Callable[[Sequence[tuple[int, Clip]]], None], batch: Sequence[tuple[int, Clip]]) -> None:
    """Write a batch of (index, clip). If that fails, write its clips one by one, and report those that fail."""
    try:
        write(batch)
    except Exception as error:  # may be of a package or lack of memory; the other clips continue
        if len(batch) == 1:
            print(printable(f"failed: {batch[0][1].id}: {reason_of(error)}"), file=sys.stderr, flush=True)
        else:
            for item in batch:
                write_or_report(write, [item])


def write_take(
    folder: Path, name: str, wave: np.ndarray, rate: int, frames: np.ndarray | None = None, **about: Any
) -> None:
    """Write an output losslessly for measurement: NAME.wav, NAME.mkv if there are frames, and `about` as NAME.json."""
    if frames is not None:
        write_video(folder / f"{name}.mkv", frames, FPS, lossless=True)
    if about:
        write_json(folder / f"{name}.json", about)
    write_wav(folder / f"{name}.wav", wave, rate, lossless=True)
