"""The released data of Talker-T2AV as a source; apart from the others, whose processes need not import that model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from engine.errors import UserError
from scripts.preparation.clip import SourceClip, make_key
from scripts.preparation.sources import Source
from talker_t2av.data import Row, read_csv, read_txt


class TalkerData(Source):
    """The released Talker-T2AV-Data: sound and motion codes, no pictures.

    Args:
        root: folder of the relative paths.
        table: CSV with the columns motion_pt_path, wav_path, text.
        listing: instead of a table, a text file with one motion file a line; the sound is SOUNDS/{stem}.wav, and the
            text in a JSON file beside it.
        sounds: that folder.

    Raises:
        UserError: not exactly one of table and listing is given, or it cannot be read.
    """

    frames = False

    def __init__(
        self, root: str | Path, table: str | None = None, listing: str | None = None, sounds: str | None = None
    ) -> None:
        super().__init__(root)
        if (table is None) == (listing is None) or (listing is not None and sounds is None):
            raise UserError("give source.table=FILE.csv, or source.listing=FILE.txt with source.sounds=FOLDER")
        self.rows = read_csv(self.root / table) if table else read_txt(self.root / listing, self.root / sounds)

    def splits(self) -> list[str]:
        return ["train"]

    def read(self, split: str) -> Iterator[SourceClip]:
        for row in self.rows:
            yield _talker_clip(row)


def _talker_clip(row: Row) -> SourceClip:
    wav, motion = row.wav.as_posix(), row.motion.as_posix() if row.motion else None
    return SourceClip(make_key(os.path.splitext(wav)[0]), audio=wav, text=row.text or None, motion=motion)
