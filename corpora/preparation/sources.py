"""Sources of clips: a function per folder layout, which finds the clips of each split in a fixed order.

Data sets without a validation split get one, `val`: all clips of some speakers (or videos, if speakers are unknown),
selected by a digest of their names. Splits do not overlap.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from corpora.preparation.clip import SourceClip, make_key, with_digest
from engine import untrusted
from engine.errors import UserError
from engine.files import report_os_errors
from engine.settings import require_range
from engine.shards.recordings import read_manifest
from talker_t2av.phonemes import SYMBOLS

T = TypeVar("T")
SOUNDS = (".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus")


@dataclass(frozen=True)
class Source:
    """A data set on disk.

    Attributes:
        root: folder of the data set.
        splits: names of the available splits, which are names of folders in the output.
        read: returns the clips of a split in a fixed order. Keys need not be unique yet.
        frames: whether clips have video.
        symbols: phonemes of the labels, None without labels.
    """

    root: Path
    splits: list[str]
    read: Callable[[str], Iterable[SourceClip]]
    frames: bool = True
    symbols: list[str] | None = None

    def __post_init__(self) -> None:
        for name in self.splits:
            untrusted.safe_name(name, f"{self.root}: the split")

    def clips(self, split: str) -> list[SourceClip]:
        """Return the clips of a split in a fixed order."""
        if split not in self.splits:
            raise UserError(f"{self.root} has no split {split}; available: {', '.join(self.splits) or 'none'}")
        clips = list(self.read(split))
        if not clips:
            raise UserError(f"{self.root}: no clips in split {split}")
        twice = [name for name, count in Counter(clip.source for clip in clips).items() if count > 1]
        if twice:
            raise UserError(
                f"{self.root}: {twice[0]} is listed more than once in split {split}: keep one of them; "
                "make_speech_corpus.py has --repeat 1 for this"
            )
        shared = {key for key, count in Counter(clip.key for clip in clips).items() if count > 1}
        return [replace(c, key=with_digest(c.key, c.source)) if c.key in shared else c for c in clips]


def synthetic(root: str | Path, all_symbols: bool = False) -> Source:
    """Find a corpus of scripts/make_*_corpus.py: ROOT/SPLIT.jsonl, ROOT/SPLIT/ID.wav and, with faces, .mp4.

    `make_speech_corpus.py` needs --repeat 1, as each clip may be listed only once.

    Args:
        all_symbols: use the phoneme indices of all versions, so that a model can be trained on several. False: only the
            phonemes of the corpus, as for the bundled HiCoDiT. Speech without video always uses all.
    """
    root = existing(root)
    splits = sorted(path.stem for path in root.glob("*.jsonl"))
    rows = read_manifest(root, "train" if "train" in splits else splits[0]) if splits else []  # valid for all splits
    frames = any("face" in row for row in rows)
    symbols = sorted({p[0] for row in rows for p in row["phonemes"]}) if frames and not all_symbols else SYMBOLS

    def read(split: str) -> Iterator[SourceClip]:
        for row in read_manifest(root, split):
            yield SourceClip(
                key=make_key(row["id"]),
                video=f"{split}/{row['id']}.mp4" if frames else None,
                audio=f"{split}/{row['id']}.wav",
                text=row.get("text", ""),
                speaker=str(row["voice"]),
                language="en",
                expression=row.get("expressions", row.get("expression", "neutral")),
                phonemes=row.get("phonemes"),
            )

    return Source(root, splits, read, frames, symbols)


def voxceleb2(root: str | Path, validation: float = 0.01) -> Source:
    """Find ROOT/{dev,test}/mp4/idXXXXX/VIDEO/00001.mp4; the audio of ROOT/{dev,test}/aac/... (.m4a) if that tree
    exists.

    Args:
        validation: fraction of dev's speakers in the split `val`. The official test speakers are unchanged.
    """
    root = existing(root)
    split_of = held_out(_folders(root / "dev" / "mp4"), {"val": validation})

    def read(split: str) -> Iterator[SourceClip]:
        folder = "test" if split == "test" else "dev"
        has_sounds = (root / folder / "aac").is_dir()  # avoids a million file checks if the tree does not exist
        for name in _walk(root / folder / "mp4", 2, ".mp4"):
            speaker = name.partition("/")[0]
            sound = f"{folder}/aac/{name}.m4a"
            if folder == "test" or split_of.get(speaker, "dev") == split:
                yield SourceClip(
                    key=make_key(name),
                    video=f"{folder}/mp4/{name}.mp4",
                    audio=sound if has_sounds and (root / sound).is_file() else None,
                    speaker=speaker,
                )

    has = {
        "dev": (root / "dev" / "mp4").is_dir(),
        "val": bool(split_of),
        "test": (root / "test" / "mp4").is_dir(),
    }
    return Source(root, [name for name in has if has[name]], read)


def lrs2(root: str | Path) -> Source:
    """Find ROOT/{main,pretrain}/VIDEO/00001.mp4 and .txt.

    ROOT/{train,val,test}.txt list clips of main, pretrain.txt those of pretrain (without that list: all of them). The
    folders may be in ROOT/mvlrs_v1, as in the archive, and the lists there or in ROOT.
    """
    root = existing(root)
    below = "mvlrs_v1/" if (root / "mvlrs_v1" / "main").is_dir() else ""
    listings = {}
    for name in ("pretrain", "train", "val", "test"):
        paths = root / f"{name}.txt", root / below / f"{name}.txt"
        listing = next((path for path in paths if path.is_file()), None)
        if listing or (name == "pretrain" and (root / below / name).is_dir()):
            listings[name] = listing

    def read(split: str) -> Iterator[SourceClip]:
        folder = below + ("pretrain" if split == "pretrain" else "main")
        listing = listings[split]
        for line in read_lines(listing) if listing else _walk(root / folder, 1, ".mp4"):
            yield _with_text(folder, line.split()[0])  # the test list has annotations after some names

    return Source(root, [*listings], read)


def lrs3(root: str | Path, validation: float = 0.02) -> Source:
    """Find ROOT/{pretrain,trainval,test}/VIDEO/00001.mp4 and .txt.

    Args:
        validation: fraction of trainval's videos in the split `val`, which are also excluded from pretrain.
    """
    root = existing(root)
    split_of = held_out(_folders(root / "trainval"), {"val": validation})

    def read(split: str) -> Iterator[SourceClip]:
        folder = "trainval" if split == "val" else split
        for name in _walk(root / folder, 1, ".mp4"):
            if split == "test" or (name.partition("/")[0] in split_of) == (split == "val"):
                yield _with_text(folder, name)

    splits = [name for name in ("pretrain", "trainval", "test") if (root / name).is_dir()]
    return Source(root, [*splits, "val"] if split_of else splits, read)


def folder(root: str | Path, table: str = "clips.csv") -> Source:
    """Find the clips of a CSV file with a column `path`, and `audio`, `text`, `speaker`, `language`, `expression`,
    `split` if they are known, and `start` and `end` in seconds if only a part of a file is a clip. A path to an audio
    file is a clip without video.

    Args:
        root: folder of the relative paths.
        table: the CSV file; a relative path is relative to `root`.
    """
    root = existing(root)
    clips: dict[str, list[SourceClip]] = {}
    for row in read_table(root / table, ("path",)):
        known = {name: row.get(name) or None for name in ("audio", "text", "speaker", "language", "expression")}
        stem, suffix = os.path.splitext(row["path"])
        known["audio" if suffix.lower() in SOUNDS else "video"] = row["path"]
        try:
            span = read_span(row) if row.get("start") or row.get("end") else None
        except UserError as error:
            raise UserError(f"source.table={root / table}, {row['path']}: {error}") from None
        clips.setdefault(row.get("split") or "train", []).append(SourceClip(make_key(stem), span=span, **known))
    return Source(root, sorted(clips), clips.__getitem__)


def read_span(row: Mapping[str, Any]) -> tuple[float, float]:
    """Return the entries `start` and `end` of a row in seconds. Raise UserError if they are invalid."""
    start = read_number(row.get("start"))
    end = read_number(row.get("end"))
    if not 0 <= start < end < 1e6:
        raise UserError(f"start={row.get('start')} and end={row.get('end')} must be times in seconds, in this order")
    return start, end


def read_number(value: Any) -> float:
    """Parse a finite number. Return -1 if the text is not one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return -1.0
    return number if math.isfinite(number) else -1.0


def existing(root: str | Path) -> Path:
    """Return the path of a dataset folder; raise UserError if it does not exist."""
    if not Path(root).is_dir():
        raise UserError(f"source.root={root} is not a folder")
    return Path(root)


def divided(
    root: Path, clips: list[tuple[str, SourceClip]], split_of: Mapping[str, str] | None = None, **fractions: float
) -> Source:
    """Create a source for a data set without splits: groups of clips are held out for `val` and `test`.

    Args:
        clips: all clips in a fixed order, each with its group: a speaker, a video, or a file if speakers are unknown.
        split_of: split of each held-out group. None: determined by `held_out` with `fractions`.
    """
    split_of = held_out((group for group, _ in clips), fractions) if split_of is None else split_of
    splits: dict[str, list[SourceClip]] = {"train": [], "val": [], "test": []}
    for group, clip in clips:
        splits[split_of.get(group, "train")].append(clip)
    return Source(root, [name for name, of_split in splits.items() if of_split], splits.__getitem__)


def _with_text(folder: str, name: str) -> SourceClip:
    """Describe VIDEO/CLIP of LRS. VIDEO is used as the speaker, as speakers are not named."""
    path = f"{folder}/{name}"
    return SourceClip(
        make_key(name), f"{path}.mp4", text_file=f"{path}.txt", speaker=name.partition("/")[0], language="en"
    )


def held_out(groups: Iterable[str], fractions: Mapping[str, float]) -> dict[str, str]:
    """Return the split of each held-out group (a speaker, a video). Training groups are absent.

    A fraction above 0 selects at least one group, and at least one group remains for training.

    Args:
        fractions: fraction of the groups by split.
    """
    for split, fraction in fractions.items():
        require_range(f"the fraction of the split {split}", fraction, 0.0, 0.9)
    names = sorted(set(groups), key=lambda name: hashlib.sha256(name.encode()).digest())
    found: dict[str, str] = {}
    for split, fraction in fractions.items():
        count = min(max(1, round(fraction * len(names))) if fraction else 0, len(names) - len(found) - 1)
        found |= dict.fromkeys(names[len(found) :][: max(0, count)], split)
    return found


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """Return `count` items, spread evenly over their order, or all items if there are fewer."""
    count = min(count, len(items))
    return [items[k * len(items) // count] for k in range(count)]


def _folders(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`, or [] if it does not exist."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []


def _walk(folder: Path, depth: int, suffix: str) -> Iterator[str]:
    """Yield files DEPTH folders below `folder` in alphabetical order, as relative paths without the suffix."""
    with report_os_errors(f"cannot list {folder}"):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if depth and entry.is_dir():
            yield from (f"{entry.name}/{below}" for below in _walk(folder / entry.name, depth - 1, suffix))
        elif not depth and entry.name.endswith(suffix):
            yield entry.name.removesuffix(suffix)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a list that are not blank."""
    return [line.strip() for line in untrusted.read_lines(path, f"the list {path}") if line.strip()]


def read_table(path: Path, columns: tuple[str, ...], setting: str = "source.table") -> list[dict[str, str]]:
    """Return the rows of a CSV file that has the given columns. `setting` names the file in errors."""
    text = "\n".join(untrusted.read_lines(path, f"{setting}={path}"))
    reader = csv.DictReader(io.StringIO(text))
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():  # where the row is longer, and where it is shorter
                header = f"its header has {len(reader.fieldnames)} columns"
                raise UserError(f"{setting}={path}, line {reader.line_num}: {header}: quote cells that contain a comma")
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{setting}={path} cannot be read as CSV ({error})") from error
    for column in columns:
        if not rows or column not in rows[0]:
            raise UserError(f"{setting}={path} has no rows with a column `{column}`")
    return rows
