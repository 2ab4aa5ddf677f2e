"""Outputs that a model generates for the clips of an evaluation; those that are there already are kept."""

from __future__ import annotations

import json
import os
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

SHARE = [0, 1]  # of this process: it generates batch SHARE[0] of every SHARE[1]


class Shares(Work[list[int], bool]):
    """Generates a share of the missing outputs.

    Args:
        generate: writes the missing outputs of this process's share, given the name of a device.
        device: setting of that name. number: of the process.
    """

    def __init__(self, generate: Callable[[str], None], device: str, number: int) -> None:
        os.environ["LOCAL_RANK"] = str(number)  # `pick_device` goes by it
        self.generate, self.device = generate, str(pick_device(device))

    def run(self, item: list[int]) -> bool:
        SHARE[:] = item
        self.generate(self.device)
        return True


def generate_shares(
    generate: Callable[[str], None], device: str, devices: int = 1, ray: ClusterConfig | None = None
) -> None:
    """Generate missing outputs with a process for each device, or on a cluster; batches are those of one process.

    A share whose process dies goes on in another one, from the files that are there.
    """
    if devices == 1 and not ray:
        generate(str(pick_device(device)))
        return
    build = partial(Shares, generate, device)
    count = ray.workers if ray else devices
    with Cluster(ray, build) if ray else Processes(count, build) as executor:
        for (number, _), result in executor.run([[number, count] for number in range(count)]):
            if isinstance(result, Lost):
                print(f"failed: share {number + 1} of {count} of the clips: {result.reason}", file=sys.stderr)


def write_facts(folder: Path, model: str, weights: str | Path | None, **facts: Any) -> None:
    """Write FOLDER/system.json, what the outputs there are made with."""
    new = {"model": model, "weights": "bundled", **facts}
    if weights is not None:
        place = release_folder(weights)
        new["weights"], tensors = place.name, place / "model.safetensors"
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
) -> None:
    """Call `write` with batches of (index, clip) whose output is missing; a clip that fails is named and left out.

    Batches are made of all clips, so they are the same for each process and in a run that goes on. FOLDER/inputs.json
    keeps what each output is made of.

    Args:
        inputs: of a clip the files and texts that its output depends on.
        write: makes the files of a batch in `folder`, sound last; see `write_take`.
        length: of a clip; those of like length share a batch.
    """
    place, waiting = folder / "inputs.json", set()
    known = read_json(place) if place.is_file() else {}
    for i, clip in enumerate(clips):
        state = digest_of(inputs(clip))
        take = find_take(folder, clip.id)
        if take.audio in (None, take.video):  # nothing, or a picture whose sound is missing
            waiting.add(i)
        elif known.get(clip.id, state) != state:
            where = f"{folder} holds an output of {clip.id} that was made from other files or words"
            raise UserError(f"{where}: name another output=, or delete that folder")
        known[clip.id] = state
    write_json(place, known)
    order = sorted(enumerate(clips), key=lambda item: length(item[1]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)][SHARE[0] :: SHARE[1]]
    batches = [left for batch in batches if (left := [item for item in batch if item[0] in waiting])]
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
