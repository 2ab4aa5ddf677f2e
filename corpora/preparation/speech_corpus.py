"""A speech corpus gathered from several sources, for training speech codecs.

It has the layout of `engine.shards.recordings`: ROOT/SPLIT.jsonl with ROOT/SPLIT/ID.wav, mono at 24 kHz.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpora.preparation.sources import folder
from corpora.preparation.sources_grid import grid
from engine.errors import UserError
from engine.files import find_files, writable, write_json, write_text
from engine.media.audio import read_audio, resample_wave, write_wav
from engine.media.ffmpeg import command, last_line
from engine.progress import progress_bar
from engine.shards.recordings import read_manifest
from engine.untrusted import read_json

RATE = 24_000  # Hz
LEAST_SECONDS = 0.4  # shorter recordings are skipped


@dataclass(frozen=True)
class Recording:
    """A recording of a corpus.

    Args:
        name: name in the corpus.
        path: audio or video file.
        speaker: name of the voice.
        text: transcript, if known.
        span: start and end within the file in seconds; None: the whole file.
        others: number of copies at other speeds, which also change pitch and formants, and thus yield more voices.
    """

    name: str
    path: Path
    speaker: str
    text: str | None = None
    span: tuple[float, float] | None = None
    others: int = 0


def grid_recordings(
    root: Path, speakers: Sequence[str] | None, new_speakers: Sequence[str]
) -> dict[str, list[Recording]]:
    """Find GRID's recordings by split.

    Args:
        speakers: their sentences are divided into `train`, `val` and `test`, as `source.protocol=seen` does. None: all
            but the new ones.
        new_speakers: all of their sentences are the split `new`. Empty: there is no such split.
    """
    found: dict[str, list[Recording]] = {"train": [], "val": [], "test": []}
    for split, rows in grid_splits(root, speakers).items():
        found[split] = [row for row in rows if row.speaker not in new_speakers]
    if new_speakers:
        found["new"] = [row for rows in grid_splits(root, new_speakers).values() for row in rows]
    return found


def grid_splits(root: Path, speakers: Sequence[str] | None) -> dict[str, list[Recording]]:
    """Find the recordings of some of GRID's speakers, or of all, by split, as `source.protocol=seen` divides their
    sentences.

    Raises:
        UserError: If there are none, or none of one of the speakers.
    """
    source = grid(root, protocol="seen", speakers=speakers)
    found = {}
    for split in source.splits:
        clips = source.clips(split)
        found[split] = [Recording(clip.key, root / clip.video, clip.speaker, clip.text) for clip in clips]
    known = {row.speaker for rows in found.values() for row in rows}
    missing = [name for name in speakers or () if name not in known]
    if missing or not known:
        raise UserError(f"--grid {root} has no recordings of {', '.join(missing) or 'any speaker'}")
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
    return [
        Recording(f"synthetic-{row['id']}", root / "train" / f"{row['id']}.wav", f"synthetic-{row['voice']}")
        for row in rows
    ]


def listed_recordings(table: Path, others: int, texts: bool = False) -> list[Recording]:
    """Find the training clips of a CSV file as `source=folder` reads it, which must have a column `speaker`.

    Args:
        others: number of copies of each at other speeds.
        texts: whether texts are required.

    Raises:
        UserError: If a clip has no file, no speaker or no required text.
    """
    rows = []
    for clip in folder(table.parent, table.name).clips("train"):
        path = table.parent / (clip.audio or clip.video)
        if not os.path.isfile(path):  # unlike Path.is_file, it is False for an impossible name
            raise UserError(f"{table}: {path} does not exist")
        if not clip.speaker:
            raise UserError(f"{table}: {clip.source} has no speaker")
        if texts and not re.search("[A-Za-z]", clip.text or ""):
            raise UserError(f"{table}: {clip.source} has no text")
        rows.append(Recording(f"listed-{clip.key}", path, clip.speaker, clip.text, clip.span, others))
    return rows


def read_recording(recording: Recording) -> np.ndarray:
    """Read a recording (N,) at `RATE`.

    A G.722 file has no header that identifies its format, so `read_audio` rejects it; here the suffix is used.
    """
    path = recording.path
    if path.suffix != ".g722":
        return read_audio(path, RATE, recording.span)
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


def draw_speeds(others: int, rng: np.random.Generator) -> list[float]:
    """Return the speed of a recording, which is 1, and random speeds of `others` copies."""
    return [1.0, *(round(float(speed), 2) for speed in rng.uniform(0.85, 1.18, others))]


def at_speed(wave: np.ndarray, speed: float) -> np.ndarray:
    """Resample a waveform (N,) so that it plays `speed` times as fast."""
    return wave if speed == 1 else resample_wave(wave, RATE, round(RATE / speed / 240) * 240)


def _rows(recording: Recording, split: Path, repeat: int, rng: np.random.Generator) -> Iterator[dict]:
    """Write a recording and its copies as WAV and yield their rows `repeat` times; nothing if it is too short."""
    wave = None
    for number, speed in enumerate(draw_speeds(recording.others, rng)):
        suffix = f"_{number}" if number else ""
        row = {"id": f"{recording.name}{suffix}", "voice": f"{recording.speaker}{suffix}"}
        target = split / f"{row['id']}.wav"
        if not target.is_file():
            wave = read_recording(recording) if wave is None else wave
            if len(wave) < LEAST_SECONDS * RATE:
                return
            write_wav(target, at_speed(wave, speed), RATE)
        if recording.text:
            row["text"] = recording.text
        yield from [row] * repeat


def write_corpus(out: Path, splits: dict[str, list[tuple[Recording, int]]], details: dict, seed: int = 0) -> None:
    """Write the recordings of each split, repeated the given number of times.

    Existing recordings are kept, so that an interrupted call can be continued.

    Args:
        details: additional entries of corpus.json.
        seed: random seed of the speeds.

    Raises:
        UserError: If a split has no recordings, or `out` contains a corpus with other details.
    """
    about = out / "corpus.json"
    old = read_json(about).get("command") if about.is_file() else details.get("command")
    if old != details.get("command"):
        raise UserError(f"--out {out} contains a corpus made with other arguments: use the same, or another folder")
    with writable(out, "--out"):
        write_json(about, details | {"rate": RATE, "recordings": {}})  # of an interrupted call, too
        counts = {split: _write_split(out, split, recordings, seed) for split, recordings in splits.items()}
        write_json(about, details | {"rate": RATE, "recordings": counts})


def _write_split(out: Path, split: str, recordings: list[tuple[Recording, int]], seed: int) -> int:
    """Write a split and return its number of recordings, repetitions included."""
    target = out / split
    target.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for recording, repeat in progress_bar(recordings, len(recordings), split):
        rows.extend(_rows(recording, target, repeat, rng))
    if not rows:
        raise UserError(f"the split {split} has no recordings of {LEAST_SECONDS} s or more: check the folders")
    write_text(out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)
