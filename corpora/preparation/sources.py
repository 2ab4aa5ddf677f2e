"""Where clips come from: a class for each folder layout, which lists the clips of a split in a fixed order."""

from __future__ import annotations

import csv
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from corpora.preparation.clip import SourceClip, make_key, with_digest
from engine.errors import UserError
from engine.media.corpus import read_manifest
from engine.untrusted import safe_name

SOUNDS = (".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus")


class Source:
    """A data set on disk.

    Args:
        root: its folder.

    Attributes:
        frames: whether its clips have pictures. symbols: the phonemes of its labels, None without.

    Raises:
        UserError: there is no such folder.
    """

    frames = True
    symbols: list[str] | None = None

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"source.root={root} is not a folder")

    def splits(self) -> list[str]:
        """Names of the splits that are there."""
        raise NotImplementedError

    def read(self, split: str) -> Iterable[SourceClip]:
        """The clips of a split in a fixed order; their keys need not be unique yet."""
        raise NotImplementedError

    def clips(self, split: str) -> list[SourceClip]:
        """The clips of a split in a fixed order.

        Raises:
            UserError: there is no such split, it is empty, or names a clip twice.
        """
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


class Synthetic(Source):
    """The corpus of make_synthetic_corpus.py: ROOT/SPLIT.jsonl, ROOT/SPLIT/ID.mp4 and .wav."""

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        known = "train" if "train" in self.splits() else next(iter(self.splits()), None)
        rows = read_manifest(self.root, known) if known else []
        self.symbols = sorted({p[0] for row in rows for p in row["phonemes"]})  # of one split, for all splits

    def splits(self) -> list[str]:
        return sorted(path.stem for path in self.root.glob("*.jsonl"))

    def read(self, split: str) -> Iterator[SourceClip]:
        for row in read_manifest(self.root, split):
            yield SourceClip(
                key=make_key(row["id"]),
                video=f"{split}/{row['id']}.mp4",
                audio=f"{split}/{row['id']}.wav",
                text=row["text"],
                speaker=str(row["voice"]),
                language="en",
                expression=row.get("expressions", row["expression"]),
                phonemes=row["phonemes"],
            )


class VoxCeleb2(Source):
    """ROOT/{dev,test}/mp4/idXXXXX/VIDEO/00001.mp4; the sound of ROOT/{dev,test}/aac/... (.m4a) where that tree is."""

    def splits(self) -> list[str]:
        return [name for name in ("dev", "test") if (self.root / name / "mp4").is_dir()]

    def read(self, split: str) -> Iterator[SourceClip]:
        has_sounds = (self.root / split / "aac").is_dir()  # spares a million looks where it is not
        for name in _walk(self.root / split / "mp4", 2, ".mp4"):
            sound = f"{split}/aac/{name}.m4a"
            yield SourceClip(
                key=make_key(name),
                video=f"{split}/mp4/{name}.mp4",
                audio=sound if has_sounds and (self.root / sound).is_file() else None,
                speaker=name.partition("/")[0],
            )


class LRS2(Source):
    """ROOT/{main,pretrain}/VIDEO/00001.mp4 and .txt.

    ROOT/{train,val,test}.txt list clips of main, pretrain.txt those of pretrain (without that list: all of them).
    """

    LISTS = ("pretrain", "train", "val", "test")

    def splits(self) -> list[str]:
        return [name for name in self.LISTS if (self.root / f"{name}.txt").is_file() or name == "pretrain"]

    def read(self, split: str) -> Iterator[SourceClip]:
        folder = "pretrain" if split == "pretrain" else "main"
        listing = self.root / f"{split}.txt"
        names = read_lines(listing) if listing.is_file() else _walk(self.root / folder, 1, ".mp4")
        for name in names:
            name = name.split()[0]  # the test list marks some clips after their names
            yield _with_text(folder, name)


class LRS3(Source):
    """ROOT/{pretrain,trainval,test}/VIDEO/00001.mp4 and .txt."""

    def splits(self) -> list[str]:
        return [name for name in ("pretrain", "trainval", "test") if (self.root / name).is_dir()]

    def read(self, split: str) -> Iterator[SourceClip]:
        for name in _walk(self.root / split, 1, ".mp4"):
            yield _with_text(split, name)


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


class TalkerData(Source):
    """The released Talker-T2AV-Data: sound and motion codes, no pictures.

    Args:
        root: folder of the relative paths.
        table: CSV with the columns motion_pt_path, wav_path, text.
        listing: instead of a table, a text file with one motion file a line; the sound is SOUNDS/STEM.wav, and the
            text in SOUNDS/STEM.json.
        sounds: that folder.
        tars: pattern of tar files under `root`, such as "*.tar": paths that they hold are read there.

    Raises:
        UserError: not exactly one of table and listing is given, or one of the files cannot be read.
    """

    frames = False

    def __init__(
        self,
        root: str | Path,
        table: str | None = None,
        listing: str | None = None,
        sounds: str | None = None,
        tars: str | None = None,
    ) -> None:
        super().__init__(root)
        if (table is None) == (listing is None) or (listing is not None and sounds is None):
            raise UserError("give source.table=FILE.csv, or source.listing=FILE.txt with source.sounds=FOLDER")
        self.table, self.listing, self.sounds = table, listing, sounds
        self.members = tar_members(self.root, tars) if tars else {}

    def splits(self) -> list[str]:
        return ["train"]

    def read(self, split: str) -> Iterator[SourceClip]:
        for wav, motion, text in self._rows():
            stem = os.path.splitext(wav)[0]
            text_file = f"{stem}.json"
            has_text = text is None and (text_file in self.members or (self.root / text_file).is_file())
            paths = [path for path in (wav, motion, text_file) if path in self.members]
            yield SourceClip(
                make_key(stem),
                audio=wav,
                text=text,
                text_file=text_file if has_text else None,
                motion=motion,
                packed={path: self.members[path] for path in paths},
            )

    def _rows(self) -> Iterator[tuple[str, str, str | None]]:
        """(sound, motion file, text or None)."""
        if self.table is not None:
            for row in read_table(self.root / self.table, ("wav_path", "motion_pt_path")):
                yield row["wav_path"], row["motion_pt_path"], row.get("text") or None
        else:
            for line in read_lines(self.root / self.listing):
                yield f"{self.sounds}/{Path(line).stem}.wav", line, None


class WavList(Source):
    """Speech alone: a text file with one sound file a line, and a JSON with the key `text` beside each.

    Args:
        root: folder of the relative paths.
        listing: the text file; a relative path stands under `root`.
    """

    frames = False

    def __init__(self, root: str | Path, listing: str) -> None:
        super().__init__(root)
        self.listing = listing

    def splits(self) -> list[str]:
        return ["train"]

    def read(self, split: str) -> Iterator[SourceClip]:
        for path in read_lines(self.root / self.listing):
            stem = os.path.splitext(path)[0]
            text_file = f"{stem}.json" if (self.root / f"{stem}.json").is_file() else None
            yield SourceClip(make_key(stem), audio=path, text_file=text_file)


def _with_text(folder: str, name: str) -> SourceClip:
    """VIDEO/CLIP of LRS; the folder, a video, stands for the speaker, who is not named."""
    path = f"{folder}/{name}"
    return SourceClip(
        make_key(name), f"{path}.mp4", text_file=f"{path}.txt", speaker=name.partition("/")[0], language="en"
    )


def _walk(folder: Path, depth: int, suffix: str) -> Iterator[str]:
    """Files DEPTH folders below `folder` in alphabetical order, as relative paths without the suffix."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror or error}") from error
    for entry in entries:
        if depth and entry.is_dir():
            yield from (f"{entry.name}/{below}" for below in _walk(folder / entry.name, depth - 1, suffix))
        elif not depth and entry.name.endswith(suffix):
            yield entry.name.removesuffix(suffix)


def read_lines(path: Path) -> list[str]:
    """The lines of a list that are not blank.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list {path} cannot be read ({error})") from error


def read_table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a CSV file that has the given columns.

    Raises:
        UserError: it cannot be read, has no rows, or lacks a column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"source.table={path} cannot be read as CSV ({error})") from error
    for column in columns:
        if not rows or column not in rows[0]:
            raise UserError(f"source.table={path} has no rows with a column `{column}`")
    return rows


def tar_members(root: Path, pattern: str) -> Mapping[str, tuple[str, int, int]]:
    """(tar file, offset, size) by name of every file in the tar files of a folder; they must not be compressed.

    Raises:
        UserError: there are none, or one is no plain tar file.
    """
    members = {}
    for path in sorted(root.glob(pattern)):
        try:
            with tarfile.open(path, "r:") as tar:
                for info in tar:
                    if info.isfile():
                        name = safe_name(os.path.normpath(info.name), f"{path}: the name", folders=True)
                        members[name] = (path.relative_to(root).as_posix(), info.offset_data, info.size)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{path} cannot be read as an uncompressed tar file ({error})") from error
    if not members:
        raise UserError(f"source.tars={pattern}: no files in tar files of that name in {root}")
    return members
