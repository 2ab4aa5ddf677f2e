"""A speech corpus gathered from several sources, for training speech codecs.

It has the layout of `engine.shards.recordings`: ROOT/SPLIT.jsonl with ROOT/SPLIT/ID.wav, mono at 24 kHz.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpora.preparation.sources_grid import find_files, grid
from engine.errors import UserError
from engine.files import write_json, write_text
from engine.media.audio import read_audio, write_wav
from engine.media.ffmpeg import command, last_line
from engine.progress import track
from engine.shards.recordings import read_manifest

RATE = 24_000  # Hz
LEAST_SECONDS = 0.4  # shorter recordings are skipped


@dataclass(frozen=True)
class Recording:
    """A recording: name in the corpus, file, speaker, and transcript if known."""

    name: str
    path: Path
    speaker: str
    text: str | None = None


def grid_recordings(root: Path, speakers: Sequence[str], new_speakers: Sequence[str]) -> dict[str, list[Recording]]:
    """Find GRID's recordings by split.

    Args:
        speakers: their sentences are divided into `train`, `val` and `test`, as `source.protocol=seen` does.
        new_speakers: all of their sentences are the split `new`.
    """
    found: dict[str, list[Recording]] = {"train": [], "val": [], "test": []}
    found |= grid_splits(root, speakers)
    found["new"] = [row for rows in grid_splits(root, new_speakers).values() for row in rows]
    return found


def grid_splits(root: Path, speakers: Sequence[str]) -> dict[str, list[Recording]]:
    """Find the recordings of some of GRID's speakers by split, as `source.protocol=seen` divides their sentences."""
    source = grid(root, protocol="seen", speakers=speakers)
    found = {}
    for split in source.splits:
        clips = source.clips(split)
        found[split] = [Recording(clip.key, root / clip.video, clip.speaker, clip.text) for clip in clips]
    return found


def prompt_recordings(root: Path) -> list[Recording]:
    """Find the G.722 prompts below `root`, as Debian's packages `asterisk-core-sounds-*-g722` install them."""
    rows = []
    for path in find_files(root, ".g722"):
        rows.append(Recording("-".join(path.with_suffix("").parts), root / path, speaker=path.parts[0]))
    return rows


def synthetic_recordings(root: Path, count: int) -> list[Recording]:
    """List the first `count` training clips of a synthetic corpus (`scripts/make_synthetic_corpus.py`)."""
    rows = read_manifest(root, "train")[:count]
    return [Recording(f"synthetic-{row['id']}", root / "train" / f"{row['id']}.wav", str(row["voice"])) for row in rows]


def read_recording(path: Path) -> np.ndarray:
    """Read a recording (N,) at `RATE`.

    A G.722 file has no header that identifies its format, so `read_audio` rejects it; here the suffix is used.
    """
    if path.suffix != ".g722":
        return read_audio(path, RATE)
    arguments = (
        "-v",
        "error",
        "-f",
        "g722",
        "-i",
        f"file:{path}",
        "-ac",
        "1",
        "-ar",
        str(RATE),
        "-f",
        "f32le",
        "pipe:1",
    )
    result = subprocess.run(command(*arguments), capture_output=True)
    if result.returncode:
        raise UserError(f"{path} cannot be decoded ({last_line(result.stderr.decode(errors='replace'))})")
    return np.frombuffer(result.stdout, "<f4")


def _copies(recording: Recording, folder: Path, repeat: int) -> Iterator[dict]:
    """Write a recording as WAV and yield its row once per repetition; nothing if it is too short."""
    target = folder / f"{recording.name}.wav"
    if not target.is_file():
        wave = read_recording(recording.path)
        if len(wave) < LEAST_SECONDS * RATE:
            return
        write_wav(target, wave, RATE)
    row = {"id": recording.name, "speaker": recording.speaker}
    if recording.text:
        row["text"] = recording.text
    for _ in range(repeat):
        yield row


def write_corpus(out: Path, splits: dict[str, list[tuple[Recording, int]]], details: dict) -> None:
    """Write the recordings of each split, repeated the given number of times.

    Existing recordings are kept, so that an interrupted call can be continued.

    Raises:
        UserError: If a split has no recordings.
    """
    for split, recordings in splits.items():
        if not recordings:
            raise UserError(f"the split {split} has no recordings: check the folders")
        folder = out / split
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for recording, repeat in track(recordings, len(recordings), split):
            rows.extend(_copies(recording, folder, repeat))
        write_text(out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    counts = {split: len(recordings) for split, recordings in splits.items()}
    write_json(out / "corpus.json", details | {"rate": RATE, "recordings": counts})
