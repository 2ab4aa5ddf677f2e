"""Outputs that a model generates for the clips of an evaluation; those that are there already are kept."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError, printable
from engine.evaluation.clips import Clip, find_take, system_facts
from engine.evaluation.measure import file_digest
from engine.files import atomic_output
from engine.hub import release_folder
from engine.media.audio import write_wav
from engine.media.video import write_video
from engine.progress import track
from engine.untrusted import parse_json


def write_facts(folder: Path, model: str, weights: str | Path | None, **facts: Any) -> None:
    """Write FOLDER/system.json, what the outputs there are made with.

    Raises:
        UserError: those that are there were made with something else.
    """
    place = None if weights is None else release_folder(weights)
    new = {"model": model, "weights": place.name if place else "bundled", **facts}
    if place is not None and (place / "model.safetensors").is_file():
        new["size_of_weights"] = (place / "model.safetensors").stat().st_size
    new = json.loads(json.dumps(new))
    old = system_facts(folder)
    if old and old != new:
        raise UserError(f"{folder} holds outputs made with other settings: name another output=, or delete that folder")
    with atomic_output(folder / "system.json") as partial:
        partial.write_text(json.dumps(new, indent=1) + "\n")


def generate_missing(
    clips: Sequence[Clip],
    folder: Path,
    batch_size: int,
    inputs: Callable[[Clip], Sequence[Path | str | None]],
    write: Callable[[Sequence[tuple[int, Clip]]], None],
    length: Callable[[Clip], float] = lambda clip: 0.0,
) -> None:
    """Call `write` with batches of (index, clip) whose output is missing; a clip that fails is named and left out.

    FOLDER/inputs.json keeps what each output is made of.

    Args:
        inputs: of a clip the files and texts that its output depends on.
        write: makes the files of a batch in `folder`, the one that `find_take` finds last.
        length: of a clip; those of like length share a batch.

    Raises:
        UserError: an output that is there was made from other inputs, such as another file of the same name.
    """
    place, waiting, known = folder / "inputs.json", [], {}
    if place.is_file():
        known = parse_json(place.read_bytes(), place)
    for i, clip in enumerate(clips):
        state = _digest_of(inputs(clip))
        if find_take(folder, clip.id).audio is None:
            waiting.append((i, clip))
        elif known.get(clip.id, state) != state:
            where = f"{folder} holds an output of {clip.id} that was made from other files or words"
            raise UserError(f"{where}: name another output=, or delete that folder")
        known[clip.id] = state
    with atomic_output(place) as partial:
        partial.write_text(json.dumps(known, indent=1) + "\n")
    waiting.sort(key=lambda item: length(item[1]))
    batches = [waiting[start : start + batch_size] for start in range(0, len(waiting), batch_size)]
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
    folder: Path,
    name: str,
    wave: np.ndarray,
    rate: int,
    frames: np.ndarray | None = None,
    fps: float = 25,
    **about: Any,
) -> None:
    """Write an output as it is measured, without loss: NAME.mkv, NAME.json (`about`) and NAME.wav, if there are any."""
    if frames is not None:
        write_video(folder / f"{name}.mkv", frames, fps, lossless=True)
    if about:
        with atomic_output(folder / f"{name}.json") as partial:
            partial.write_text(json.dumps(about) + "\n")
    write_wav(folder / f"{name}.wav", wave, rate, lossless=True)


def _digest_of(inputs: Sequence[Path | str | None]) -> str:
    values = [file_digest(value) if isinstance(value, Path) else value for value in inputs]
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()
