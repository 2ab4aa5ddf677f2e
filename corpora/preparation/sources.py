"""Where clips come from: a class for each folder layout, which lists the clips of a split in a fixed order.

Data sets without a validation split of their own get one, `val`: all clips of some speakers (or videos, where speakers
are not named), chosen by a digest of their names. Nothing of it is in another split.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from corpora.preparation.clip import SourceClip, make_key, with_digest
from engine import untrusted
from engine.errors import UserError
from engine.files import report_os_errors
from engine.settings import require_range
from engine.shards.recordings import read_manifest
from talker_t2av.phonemes import SYMBOLS

SOUNDS = (".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus")


class Source:
    """A data set on disk.

    Args:
        root: its folder.

    Attributes:
        frames: whether its clips have pictures. symbols: the phonemes of its labels, None without.
    """

    frames = True
    symbols: list[str] | None = None

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"source.root={root} is not a folder")

    def splits(self) -> list[str]:
        """Return the names of the splits that are there."""
        raise NotImplementedError

    def read(self, split: str) -> Iterable[SourceClip]:
        """Return the clips of a split in a fixed order; their keys need not be unique yet."""
        raise NotImplementedError

    def clips(self, split: str) -> list[SourceClip]:
        """Return the clips of a split in a fixed order."""
        if split not in self.splits():
            raise UserError(f"{self.root} has no split {split}; there are: {', '.join(self.splits()) or 'none'}")
        clips = list(self.read(split))
        if not clips:
            raise UserError(f"{self.root}: no clips in split {split}")
        twice = [name for name, count in Counter(clip.source for clip in clips).items() if count > 1]
        if twice:
            raise UserError(f"{self.root}: {twice[0]} is listed more than once in split {split}: keep one of them")
        shared = {key for key, count in Counter(clip.key for clip in clips).items() if count > 1}
        return [replace(c, key=with_digest(c.key, c.source)) if c.key in shared else c for c in clips]


class Unsplit(Source):
    """A data set without splits of its own: `val` and `test` are groups of clips that are held out.

    Args:
        validation, test: shares of the groups (speakers, videos, or files where speakers are not named).
        customary: groups that are customary for testing, if there are others, too.
    """

    def __init__(self, root: str | Path, validation: float, test: float = 0.0, customary: Sequence[str] = ()) -> None:
        super().__init__(root)
        self.found = list(self.walk())
        groups = {group for group, _ in self.found}
        tests = groups.intersection(customary if len(groups) > len(customary) else ())
        self.own = dict.fromkeys(tests, "test") | held_out(groups - tests, {"test": test, "val": validation})

    def walk(self) -> Iterator[tuple[str, SourceClip]]:
        """Yield all clips in a fixed order, each with its group."""
        raise NotImplementedError

    def splits(self) -> list[str]:
        names = {self.own.get(group, "train") for group, _ in self.found}
        return [name for name in ("train", "val", "test") if name in names]

    def read(self, split: str) -> Iterator[SourceClip]:
        return (clip for group, clip in self.found if self.own.get(group, "train") == split)


class Synthetic(Source):
    """The corpus of make_synthetic_corpus.py: ROOT/SPLIT.jsonl, ROOT/SPLIT/ID.mp4 (not version 3) and .wav.

    Args:
        all_symbols: number the phonemes of every version alike, so that one model can learn from several; false: those
            that the corpus speaks, as the bundled HiCoDiT has them. Speech alone always has all.
    """

    def __init__(self, root: str | Path, all_symbols: bool = False) -> None:
        super().__init__(root)
        known = "train" if "train" in self.splits() else next(iter(self.splits()), None)
        rows = read_manifest(self.root, known) if known else []
        self.frames = any("face" in row for row in rows)
        spoken = {p[0] for row in rows for p in row["phonemes"]}  # of one split, for all splits
        self.symbols = sorted(spoken) if self.frames and not all_symbols else SYMBOLS

    def splits(self) -> list[str]:
        return sorted(path.stem for path in self.root.glob("*.jsonl"))

    def read(self, split: str) -> Iterator[SourceClip]:
        for row in read_manifest(self.root, split):
            yield SourceClip(
                key=make_key(row["id"]),
                video=f"{split}/{row['id']}.mp4" if self.frames else None,
                audio=f"{split}/{row['id']}.wav",
                text=row["text"],
                speaker=str(row["voice"]),
                language="en",
                expression=row.get("expressions", row["expression"]),
                phonemes=row["phonemes"],
            )


class VoxCeleb2(Source):
    """ROOT/{dev,test}/mp4/idXXXXX/VIDEO/00001.mp4; the sound of ROOT/{dev,test}/aac/... (.m4a) where that tree is.

    Args:
        validation: share of dev's speakers that make the split `val`; the official test speakers stay untouched.
    """

    def __init__(self, root: str | Path, validation: float = 0.01) -> None:
        super().__init__(root)
        self.own = held_out(_folders(self.root / "dev" / "mp4"), {"val": validation})

    def splits(self) -> list[str]:
        names = [name for name in ("dev", "test") if (self.root / name / "mp4").is_dir()]
        return names[:1] + ["val"] * bool(self.own) + names[1:] if "dev" in names else names

    def read(self, split: str) -> Iterator[SourceClip]:
        folder = "test" if split == "test" else "dev"
        has_sounds = (self.root / folder / "aac").is_dir()  # spares a million looks where it is not
        for name in _walk(self.root / folder / "mp4", 2, ".mp4"):
            speaker, sound = name.partition("/")[0], f"{folder}/aac/{name}.m4a"
            if folder == "test" or self.own.get(speaker, "dev") == split:
                yield SourceClip(
                    key=make_key(name),
                    video=f"{folder}/mp4/{name}.mp4",
                    audio=sound if has_sounds and (self.root / sound).is_file() else None,
                    speaker=speaker,
                )


class LRS2(Source):
    """ROOT/{main,pretrain}/VIDEO/00001.mp4 and .txt.

    ROOT/{train,val,test}.txt list clips of main, pretrain.txt those of pretrain (without that list: all of them). The
    folders may stand in ROOT/mvlrs_v1, as its archive unpacks, and the lists there or in ROOT.
    """

    LISTS = ("pretrain", "train", "val", "test")

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self.below = "mvlrs_v1/" if (self.root / "mvlrs_v1" / "main").is_dir() else ""

    def splits(self) -> list[str]:
        found = {name: self._listing(name).is_file() for name in self.LISTS}
        found["pretrain"] |= (self.root / self.below / "pretrain").is_dir()
        return [name for name in self.LISTS if found[name]]

    def _listing(self, split: str) -> Path:
        path = self.root / f"{split}.txt"
        return path if path.is_file() else self.root / self.below / f"{split}.txt"

    def read(self, split: str) -> Iterator[SourceClip]:
        folder = self.below + ("pretrain" if split == "pretrain" else "main")
        listing = self._listing(split)
        names = read_lines(listing) if listing.is_file() else _walk(self.root / folder, 1, ".mp4")
        for name in names:
            name = name.split()[0]  # the test list marks some clips after their names
            yield _with_text(folder, name)


class LRS3(Source):
    """ROOT/{pretrain,trainval,test}/VIDEO/00001.mp4 and .txt.

    Args:
        validation: share of trainval's videos that make the split `val`; they are left out of pretrain, too.
    """

    def __init__(self, root: str | Path, validation: float = 0.02) -> None:
        super().__init__(root)
        self.own = held_out(_folders(self.root / "trainval"), {"val": validation})

    def splits(self) -> list[str]:
        names = [name for name in ("pretrain", "trainval", "test") if (self.root / name).is_dir()]
        return [*names, *["val"] * bool(self.own)]

    def read(self, split: str) -> Iterator[SourceClip]:
        folder = "trainval" if split == "val" else split
        for name in _walk(self.root / folder, 1, ".mp4"):
            if split == "test" or (name.partition("/")[0] in self.own) == (split == "val"):
                yield _with_text(folder, name)


class Folder(Source):
    """Any folder with a table: a CSV file with a column `path`, and `audio`, `text`, `speaker`, `language`,
    `expression`, `split` if they are known. A path to a sound file is a clip without pictures.

    Args:
        root: folder of the relative paths.
        table: the CSV file; a relative path stands under `root`.
    """

    def __init__(self, root: str | Path, table: str = "clips.csv") -> None:
        super().__init__(root)
        self.rows = read_table(self.root / table, ("path",))

    def splits(self) -> list[str]:
        return sorted({row.get("split") or "train" for row in self.rows})

    def read(self, split: str) -> Iterator[SourceClip]:
        for row in self.rows:
            if (row.get("split") or "train") == split:
                known = {name: row.get(name) or None for name in ("audio", "text", "speaker", "language", "expression")}
                stem, suffix = os.path.splitext(row["path"])
                known["audio" if suffix.lower() in SOUNDS else "video"] = row["path"]
                yield SourceClip(make_key(stem), **known)


def _with_text(folder: str, name: str) -> SourceClip:
    """Describe VIDEO/CLIP of LRS; the folder, a video, stands for the speaker, who is not named."""
    path = f"{folder}/{name}"
    return SourceClip(
        make_key(name), f"{path}.mp4", text_file=f"{path}.txt", speaker=name.partition("/")[0], language="en"
    )


def held_out(groups: Iterable[str], shares: Mapping[str, float]) -> dict[str, str]:
    """Return by group (a speaker, a video) the split that it is held out for; groups that train are absent.

    A share above 0 takes at least one group, and at least one is left for training: of a single group nothing is held
    out.

    Args:
        shares: by split, the share of the groups.
    """
    for split, share in shares.items():
        require_range(f"the share of the split {split}", share, 0.0, 0.9)
    names = sorted(set(groups), key=lambda name: hashlib.sha256(name.encode()).digest())
    found: dict[str, str] = {}
    for split, share in shares.items():
        count = min(max(1, round(share * len(names))) if share else 0, len(names) - len(found) - 1)
        found |= dict.fromkeys(names[len(found) :][: max(0, count)], split)
    return found


def _folders(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`; [] where it is not."""
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


def read_table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Return the rows of a CSV file that has the given columns."""
    try:
        text = "\n".join(untrusted.read_lines(path, f"source.table={path}"))
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise UserError(f"source.table={path} cannot be read as CSV ({error})") from error
    for column in columns:
        if not rows or column not in rows[0]:
            raise UserError(f"source.table={path} has no rows with a column `{column}`")
    return rows
