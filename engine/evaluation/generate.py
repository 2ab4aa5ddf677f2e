"""Outputs that a model generates for the clips of an evaluation; those that are there already are kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.cluster import Cluster
from engine.device import pick_device
from engine.errors import UserError, printable
from engine.evaluation.clips import Clip, find_take, system_facts
from engine.evaluation.measure import digest_of
from engine.files import write_json
from engine.hub import release_folder
from engine.media.audio import write_wav
from engine.media.video import write_video
from engine.metrics.speech import FPS
from engine.processes import Lost, Processes, Work
from engine.progress import track
from engine.settings import ClusterConfig
from engine.untrusted import read_json

ALL_BATCHES = slice(None)


class OutputGenerator(Work[slice, bool]):
    """Generates some batches of the missing outputs in a process with its own device.

    Args:
        generate: writes the missing outputs, given the name of a device and which of all batches to write.
        device: name of the device, as for `pick_device`.
        index: of the process's GPU.
    """

    def __init__(self, generate: Callable[[str, slice], None], device: str, index: int) -> None:
        self.generate = generate
        self.device = str(pick_device(device, index))

    def run(self, batches: slice) -> bool:
        self.generate(self.device, batches)
        return True


def generate_on_devices(
    generate: Callable[[str, slice], None], device: str, devices: int = 1, ray: ClusterConfig | None = None
) -> None:
    """Generate missing outputs, with one process per device or on a Ray cluster. Batches are those of a single process.

    If a process dies, another one continues its batches from the files that exist.

    Args:
        generate: see `OutputGenerator`.
        device: name of the device, as for `pick_device`.
        devices: number of processes.
        ray: the cluster, in place of processes.
    """
    if devices == 1 and not ray:
        generate(str(pick_device(device)), ALL_BATCHES)
        return
    build = partial(OutputGenerator, generate, device)
    count = ray.workers if ray else devices
    with Cluster(ray, build) if ray else Processes(count, build) as executor:
        for batches, result in executor.run([slice(start, None, count) for start in range(count)]):
            if isinstance(result, Lost):
                print(f"failed: part {batches.start + 1} of {count} of the clips: {result.reason}", file=sys.stderr)


def write_facts(folder: Path, model: str, weights: str | Path | None, **facts: Any) -> None:
    """Write FOLDER/system.json, what the outputs there are made with."""
    new = {"model": model, "weights": "bundled", **facts}
    if weights is not None:
        place = release_folder(weights)
        new["weights"] = place.name
        tensors = place / "model.safetensors"
        new |= {"size_of_weights": tensors.stat().st_size} if tensors.is_file() else {}
    if (old := system_facts(folder)) and old != json.loads(json.dumps(new)):
        raise UserError(f"{folder} holds outputs made with other settings: name another output=, or delete that folder")
    write_json(folder / "system.json", new)


def generate_missing(
    clips: Sequence[Clip],
    folder: Path,
    batch_size: int,
    inputs: Callable[[Clip], Sequence[Path | str | None]],
    write: Callable[[Sequence[tuple[int, Clip]]], None],
    length: Callable[[Clip], float] = lambda clip: 0.0,
    chosen: slice = ALL_BATCHES,
) -> None:
    """Call `write` with batches of (index, clip) whose output is missing; a clip that fails is reported and skipped.

    All clips are divided into batches, which are therefore the same for each process and in a resumed run.
    FOLDER/inputs.json stores digests of the inputs of each output.

    Args:
        inputs: returns the files and texts that the output of a clip depends on.
        write: writes the files of a batch to `folder`, the audio last; see `write_take`.
        length: of a clip; clips of similar length share a batch.
        chosen: which of the batches to write.

    Raises:
        UserError: an output that exists was made from other inputs.
    """
    place = folder / "inputs.json"
    waiting = set()
    known = read_json(place) if place.is_file() else {}
    for i, clip in enumerate(clips):
        state = digest_of(inputs(clip))
        take = find_take(folder, clip.id)
        if take.audio in (None, take.video):  # nothing, or a picture whose audio is missing
            waiting.add(i)
        elif known.get(clip.id, state) != state:
            where = f"{folder} holds an output of {clip.id} that was made from other files or words"
            raise UserError(f"{where}: name another output=, or delete that folder")
        known[clip.id] = state
    write_json(place, known)
    order = sorted(enumerate(clips), key=lambda item: length(item[1]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = [[item for item in batch if item[0] in waiting] for batch in batches[chosen]]
    batches = [batch for batch in batches if batch]
    for batch in track(batches, len(batches), "batches"):
        try:
            write(batch)
        except UserError:
            for item in batch:  # one by one, to find the clip that ends its batch
                try:
                    write([item])
                except UserError as error:
                    print(printable(f"failed: {item[1].id}: {error}"), file=sys.stderr, flush=True)


def write_take(
    folder: Path, name: str, wave: np.ndarray, rate: int, frames: np.ndarray | None = None, **about: Any
) -> None:
    """Write an output as it is measured, without loss: NAME.mkv, NAME.json (`about`) and NAME.wav, if there are any."""
    if frames is not None:
        write_video(folder / f"{name}.mkv", frames, FPS, lossless=True)
    if about:
        write_json(folder / f"{name}.json", about)
    write_wav(folder / f"{name}.wav", wave, rate, lossless=True)
