"""Sources described by a list or tar files: parts of videos, Talker-T2AV-Data, and speech without video.

Lists of AVSpeech, HDTF, TalkVid and CelebV-HQ contain video ids, times and face positions; the videos must already be
downloaded. They are read in their published formats, other lists as CSV with a header.
"""

from __future__ import annotations

import csv
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from corpora.preparation.clip import SourceClip, make_key
from corpora.preparation.sources import Source, divided, existing, read_lines, read_number, read_span, read_table
from engine.errors import UserError, printable
from engine.files import find_files
from engine.untrusted import read_json, safe_name

EMILIA_NAME = re.compile(r"([A-Z]{2})_B\d+_S\d+(?=_W\d+$)")  # language, and with it the speaker
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".flv")
ID = re.compile(r"(?:v=|youtu\.be/|shorts/|embed/)([\w-]{11})")
FACTS = ("text", "speaker", "language", "expression")
Row = Mapping[str, Any]  # as it stands: id, start, end; if known, x, y with a height (0: fractions), and FACTS


def talker_t2av_data(
    root: str | Path,
    table: str | None = None,
    listing: str | None = None,
    sounds: str | None = None,
    tars: str | None = None,
    validation: float = 0.002,
) -> Source:
    """Find audio in a table or list, without video: speech, optionally with the motion of Talker-T2AV-Data.

    The words are the table's, or the key `text` of STEM.json beside the audio.

    Args:
        root: folder of the relative paths.
        table: CSV with the columns wav_path, motion_pt_path, text.
        listing: instead of a table, a text file with one audio file per line; with `sounds`, with one motion file per
            line.
        sounds: folder of the audio STEM.wav of a motion file.
        tars: pattern of tar files under `root`, such as "shards/*.tar": paths in them are read from there.
        validation: fraction of the clips that make the split `val`; their speakers are unknown.
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
            raise UserError(f"source.listing={listing} lists motion files: set source.sounds=FOLDER too")
        rows = [(f"{sounds}/{Path(line).stem}.wav", line, None) if sounds else (line, None, None) for line in lines]
    members = tar_members(root, tars) if tars else {}
    clips = []
    for wav, motion, text in rows:
        stem = os.path.splitext(wav)[0]
        text_file = f"{stem}.json"
        has_text = text is None and (text_file in members or (root / text_file).is_file())
        packed = {path: members[path] for path in (wav, motion, text_file) if path in members}
        facts = {"text": text, "text_file": text_file if has_text else None, "motion": motion, "packed": packed}
        clips.append((wav, SourceClip(make_key(stem), audio=wav, **facts)))
    return replace(divided(root, clips, val=validation), frames=False)


def emilia(root: str | Path, languages: list[str] | None = None, validation: float = 0.002) -> Source:
    """Find Emilia in its published form: ROOT/**/EN-B000000.tar with audio EN_B00000_S00000_W000000.mp3 and .json.

    The file name contains language and speaker, the JSON's `text` the transcript. Unpacked files are also supported.

    Args:
        languages: two-letter codes of the languages to use, such as [en]. None: all.
        validation: fraction of the speakers that make the split `val`.
    """
    root = existing(root)
    clips = []
    wanted = None if languages is None else {language.lower() for language in languages}
    members = tar_members(root, "**/*.tar") if next(root.glob("**/*.tar"), None) else {}
    unpacked = (path.as_posix() for path in find_files(root, ".mp3"))
    for sound in sorted({*(name for name in members if name.endswith(".mp3")), *unpacked}):
        name = EMILIA_NAME.match(Path(sound).stem)
        text = f"{sound.removesuffix('.mp3')}.json"
        if name is None or (wanted is not None and name[1].lower() not in wanted):
            continue
        packed = {path: members[path] for path in (sound, text) if path in members}
        facts = {"text_file": text, "speaker": name[0], "language": name[1].lower(), "packed": packed}
        clips.append((name[0], SourceClip(make_key(Path(sound).stem), None, sound, **facts)))
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
        raise UserError(f"source.tars={pattern}: no tar file in {root} matches the pattern and contains files")
    return members


def youtube_ids(
    root: str | Path, listing: str, videos: str = "videos", test: float = 0.02, validation: float = 0.01
) -> Source:
    """Find parts of downloaded videos ROOT/VIDEOS/**/ID.mp4 (or .mkv, .webm, ...), given a list of ids, times and
    positions.

    The face nearest to the given position is tracked. Clips without a video or with an invalid row are skipped and
    counted.

    Args:
        listing: AVSpeech's CSV (id, start, end, x, y without a header); a JSON file of TalkVid or CelebV-HQ; the folder
            HDTF_dataset; or a CSV with a header: id, start, end in seconds, and optionally x, y (centre of the face as
            fractions of width and height), text, speaker, language, expression.
        videos: folder of the videos.
        test, validation: fractions of the videos that make the splits `test` and `val`.
    """
    root = existing(root)
    path = root / listing
    folder = root / videos
    if not folder.is_dir():
        raise UserError(f"source.videos: {folder} is not a folder")
    files = {file.stem: (Path(videos) / file).as_posix() for file in find_files(folder, *VIDEOS)}
    files = {re.sub("^(RD|WDA|WRA)_", "", name): video for name, video in files.items()} | files  # of HDTF's program
    clips = []
    absent = 0
    bad = []
    read = _hdtf if path.is_dir() else _json if path.suffix.lower() == ".json" else _csv
    for number, row in enumerate(read(path), 1):
        try:
            video, start, end, face = _checked(row)
        except UserError as error:
            bad.append(f"clip {number}: {error}")
            continue
        if video in files:
            key = make_key(f"{video}-{round(1000 * start):07d}-{round(1000 * end):07d}")
            facts = {"speaker": video} | {name: row[name] for name in FACTS if row.get(name)}
            clips.append((video, SourceClip(key, files[video], span=(start, end), face=face, **facts)))
        else:
            absent += 1
    if absent:
        print(f"{listing}: {absent} clips are skipped, as their videos are not in {folder}")
    if bad:
        print(printable(f"{listing}: {len(bad)} clips are skipped, as their rows are invalid; the first: {bad[0]}"))
    if not clips:
        raise UserError(f"{path}: none of its {absent + len(bad)} clips can be used: check source.videos={videos}")
    return divided(root, clips, test=test, val=validation)


def _csv(path: Path) -> Iterable[Row]:
    """Read AVSpeech's rows without a header, or a table with one."""
    lines = read_lines(path)
    has_header = bool(lines) and {"id", "start", "end"} <= set(next(csv.reader(lines[:1])))
    return csv.DictReader(lines, None if has_header else ("id", "start", "end", "x", "y"))


def _json(path: Path) -> Iterator[Row]:
    """Read TalkVid: a list of clips with a link and times. CelebV-HQ: `clips` by name, with a box in fractions."""
    content = read_json(path, f"the list {path}")
    try:
        if isinstance(content, dict):
            for clip in content["clips"].values():
                box = clip["bbox"]
                times = clip["duration"]
                middle = {"x": (box["left"] + box["right"]) / 2, "y": (box["top"] + box["bottom"]) / 2}
                yield {"id": clip["ytb_id"], "start": times["start_sec"], "end": times["end_sec"], **middle}
            return
        for clip in content:
            found = ID.search(clip["info"]["Video Link"])
            speaker = str(clip["info"].get("Person ID") or "")
            yield {"id": found and found[1], "start": clip["start-time"], "end": clip["end-time"], "speaker": speaker}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a list of TalkVid or CelebV-HQ: key {error} is missing") from error


def _hdtf(folder: Path) -> Iterator[Row]:
    """Read NAME_annotion_time.txt, NAME_crop_wh.txt and NAME_resolution.txt of HDTF_dataset. NAME is the name of the
    video.
    """
    lists = sorted(folder.glob("*_annotion_time.txt"))
    if not lists:
        raise UserError(f"{folder} contains no *_annotion_time.txt: set the folder HDTF_dataset of HDTF")
    for path in lists:
        start = path.name.removesuffix("annotion_time.txt")
        crops = _by_name(folder / f"{start}crop_wh.txt")
        heights = _by_name(folder / f"{start}resolution.txt")
        for name, times in _by_name(path).items():
            video = name.removesuffix(".mp4")
            for number, time in enumerate(times):
                begin, _, end = time.partition("-")
                row = {"id": video, "start": _clock(begin), "end": _clock(end)}
                crop = crops.get(f"{video}_{number}.mp4", [])  # left, width, top, height in pixels
                if len(crop) == 4 and len(heights.get(name, [])) == 1:
                    x, width, y, height = map(read_number, crop)
                    row |= {"x": x + width / 2, "y": y + height / 2, "height": heights[name][0]}
                yield row


def _by_name(path: Path) -> dict[str, list[str]]:
    """Return lines of words by their first word; {} if the file does not exist."""
    return {line.split()[0]: line.split()[1:] for line in read_lines(path)} if path.is_file() else {}


def _clock(text: str) -> float:
    """Return the seconds of a time such as 1:05 or 01:02:05; -1 if it is invalid."""
    parts = [read_number(part) for part in text.split(":")]
    return sum(60**i * part for i, part in enumerate(reversed(parts))) if min(parts) >= 0 else -1.0


def _checked(row: Row) -> tuple[str, float, float, tuple[float, float, int] | None]:
    """Return id, start, end and face position of a row. Raise UserError if they are invalid."""
    start, end = read_span(row)
    face = None
    if row.get("x") not in (None, "") and row.get("y") not in (None, ""):
        face = (read_number(row["x"]), read_number(row["y"]), int(read_number(row.get("height", 0))))
        if not (min(face) >= 0 and (face[2] or max(face[:2]) <= 1) and max(face) < 1e5):
            raise UserError(f"the position of the face, {face[:2]}, is outside the image or is not a pair of numbers")
    return safe_name(row["id"], "its id"), start, end, face
