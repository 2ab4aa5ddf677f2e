"""Data sets that a list or tar files describe: sound and motion of Talker-T2AV-Data, and speech alone."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from corpora.preparation.clip import SourceClip, make_key
from corpora.preparation.sources import Source, divided, existing, read_lines, read_table
from engine.errors import UserError
from engine.untrusted import safe_name

EMILIA_NAME = re.compile(r"([A-Z]{2})_B\d+_S\d+(?=_W\d+$)")  # language, and with it the speaker


def listed(
    root: str | Path,
    table: str | None = None,
    listing: str | None = None,
    sounds: str | None = None,
    tars: str | None = None,
    validation: float = 0.002,
) -> Source:
    """Find sound that a table or a list names, without pictures: speech alone, or with motion of Talker-T2AV-Data.

    The words are the table's, or the key `text` of STEM.json beside the sound.

    Args:
        root: folder of the relative paths.
        table: CSV with the columns wav_path, motion_pt_path, text.
        listing: instead of a table, a text file with one sound file a line; with `sounds`, with one motion file a line.
        sounds: folder of the sound STEM.wav of a motion file.
        tars: pattern of tar files under `root`, such as "*.tar": paths that they hold are read there.
        validation: share of the clips that make the split `val`; nothing tells their speakers.
    """
    if (table is None) == (listing is None):
        raise UserError("give source.table=FILE.csv, or source.listing=FILE.txt with source.sounds=FOLDER")
    root = existing(root)
    if table is not None:
        rows = read_table(root / table, ("wav_path", "motion_pt_path"))
        rows = [(row["wav_path"], row["motion_pt_path"], row.get("text") or None) for row in rows]
    else:
        lines = read_lines(root / listing)
        if sounds is None and any(line.endswith(".pt") for line in lines):
            raise UserError(f"source.listing={listing} lists motion files: give source.sounds=FOLDER, too")
        rows = [(f"{sounds}/{Path(line).stem}.wav", line, None) if sounds else (line, None, None) for line in lines]
    members, clips = tar_members(root, tars) if tars else {}, []
    for wav, motion, text in rows:
        stem = os.path.splitext(wav)[0]
        text_file = f"{stem}.json"
        has_text = text is None and (text_file in members or (root / text_file).is_file())
        packed = {path: members[path] for path in (wav, motion, text_file) if path in members}
        about = {"text": text, "text_file": text_file if has_text else None, "motion": motion, "packed": packed}
        clips.append((wav, SourceClip(make_key(stem), audio=wav, **about)))
    return replace(divided(root, clips, val=validation), frames=False)


def emilia(root: str | Path, languages: list[str] | None = None, validation: float = 0.002) -> Source:
    """Find Emilia as it is published: speech in ROOT/**/EN-B000000.tar, sound EN_B00000_S00000_W000000.mp3 and .json.

    The name tells language and speaker, the JSON's `text` the words. Unpacked files of these names are read, too.

    Args:
        languages: two letters each, of the clips that are taken, such as [en]; None: all.
        validation: share of the speakers that make the split `val`.
    """
    root, clips = existing(root), []
    wanted = None if languages is None else {language.lower() for language in languages}
    members = tar_members(root, "**/*.tar") if next(root.glob("**/*.tar"), None) else {}
    unpacked = (path.relative_to(root).as_posix() for path in root.glob("**/*.mp3"))
    for sound in sorted({*(name for name in members if name.endswith(".mp3")), *unpacked}):
        name, text = EMILIA_NAME.match(Path(sound).stem), f"{sound.removesuffix('.mp3')}.json"
        if name is None or (wanted is not None and name[1].lower() not in wanted):
            continue
        packed = {path: members[path] for path in (sound, text) if path in members}
        about = {"text_file": text, "speaker": name[0], "language": name[1].lower(), "packed": packed}
        clips.append((name[0], SourceClip(make_key(Path(sound).stem), None, sound, **about)))
    return replace(divided(root, clips, val=validation), frames=False)


def tar_members(root: Path, pattern: str) -> Mapping[str, tuple[str, int, int]]:
    """Return (tar file, offset, size) by name of every file in the uncompressed tar files of a folder."""
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
