"""The released data of Talker-T2AV as a source; apart from the others, whose processes need not import that model."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from corpora.preparation.clip import SourceClip, make_key
from corpora.preparation.sources import Source, read_lines
from engine.errors import UserError
from engine.untrusted import safe_name
from talker_t2av.data import read_csv


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
            told = os.path.splitext(wav)[0] + ".json"
            has_told = text is None and (told in self.members or (self.root / told).is_file())
            paths = [path for path in (wav, motion, told) if path in self.members]
            yield SourceClip(
                make_key(os.path.splitext(wav)[0]),
                audio=wav,
                text=text,
                text_file=told if has_told else None,
                motion=motion,
                packed={path: self.members[path] for path in paths},
            )

    def _rows(self) -> Iterator[tuple[str, str, str | None]]:
        """(sound, motion file, text or None)."""
        if self.table is not None:
            for row in read_csv(self.root / self.table):
                yield row.wav.as_posix(), row.motion.as_posix(), row.text or None
        else:
            for line in read_lines(self.root / self.listing):
                yield f"{self.sounds}/{Path(line).stem}.wav", line, None


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
