"""Source of the GRID corpus, whose file names encode the sentences. It has no official split; see `grid` for common
ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from corpora.preparation.clip import SourceClip, make_key
from corpora.preparation.sources import Source, divided, evenly_spaced, existing, held_out, read_lines, read_table
from engine.errors import UserError
from engine.files import find_files
from engine.settings import require_choice, require_range

ALIGNMENT_RATE = 25_000  # units of GRID's alignments per second
LARGEST_LAG = 1.0  # seconds
PROTOCOLS = ("lipnet", "unseen", "seen")
LIPNET = ("s1", "s2", "s20", "s22")  # test speakers
UNSEEN = dict.fromkeys((f"s{i}" for i in (9, 20, 23, 27, 29, 30, 34)), "val") | dict.fromkeys(
    (f"s{i}" for i in (2, 4, 11, 13, 15, 18, 19, 25, 31, 33)), "test"
)
# GRID's six letters
VERBS = {"b": "bin", "l": "lay", "p": "place", "s": "set"}
COLOURS = {"b": "blue", "g": "green", "r": "red", "w": "white"}
PREPOSITIONS = {"a": "at", "b": "by", "i": "in", "w": "with"}
DIGITS = dict(zip("z123456789", ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]))
ADVERBS = {"a": "again", "n": "now", "p": "please", "s": "soon"}


def grid(
    root: str | Path,
    validation: float = 0.06,
    protocol: str = "lipnet",
    speakers: Sequence[str] | None = None,
    expression: str | None = None,
    clips_each: int | None = None,
    lags: str | Path | None = None,
) -> Source:
    """Find ROOT/**/s1/**/bbaf2n.mpg (or .mp4), as in the archives s1.zip to s34.zip. The name encodes the sentence.

    The audio of the video is used: the files of audio_25k.zip are shorter, without the silence at both ends. Files
    s1/**/bbaf2n.align, as alignments.zip unpacks, contain the times of the words, which are the `symbols`.

    Args:
        protocol: the splits. "lipnet" tests on speakers 1, 2, 20 and 22 (arXiv 1611.01599). "unseen" trains on 16
            speakers, validates on 7 and tests on 10 others, the lists of VCA-GAN (arXiv 2204.01726). "seen" holds out 5
            % of each speaker's sentences for validation and 5 % for the test: 50 and 50 of 1,000, as in VCA-GAN for
            speakers 1, 2, 4 and 29. The selection of these sentences is ours.
        validation: fraction of the other speakers of "lipnet" that are used for validation.
        speakers: speakers to use. None: all.
        expression: label of all clips; None: none.
        clips_each: maximum number of clips per speaker, evenly spaced by name. None: all.
        lags: table of scripts/measure_lags.py with the seconds by which the audio of each clip is late. Audio and words
            are moved by them; clips that are not listed stay as they are. None: no clip is moved.
    """
    require_choice("source.protocol", protocol, PROTOCOLS)
    if clips_each is not None:
        require_range("source.clips_each", clips_each, 1, 10**6)
    root = existing(root)
    lag_of = {} if lags is None else _read_lags(Path(str(lags)))
    clips = []
    for path in find_files(root, ".mpg", ".mp4"):
        speaker = _speaker(path)
        text = grid_sentence(path.stem)
        if speaker and text and (speakers is None or speaker in speakers):
            key = make_key(f"{speaker}-{path.stem}")
            facts = {"text": text, "speaker": speaker, "language": "en", "expression": expression}
            clips.append(SourceClip(key, path.as_posix(), lag=lag_of.get(key, 0.0), **facts))
    if lag_of and not any(clip.key in lag_of for clip in clips):
        raise UserError(f"source.lags={lags} lists none of the {len(clips)} clips in {root}: measure the lags of these")
    names = {clip.speaker for clip in clips}
    if clips_each is not None:
        by_speaker = ([clip for clip in clips if clip.speaker == name] for name in sorted(names))
        clips = [clip for own in by_speaker for clip in evenly_spaced(own, clips_each)]
    tests = names.intersection(LIPNET if len(names) > len(LIPNET) else ())
    split_of = dict.fromkeys(tests, "test") | held_out(names - tests, {"val": validation})
    if protocol == "unseen":
        split_of = UNSEEN
    if protocol == "seen":
        split_of = {}
        for name in names:
            split_of |= held_out((clip.key for clip in clips if clip.speaker == name), {"test": 0.05, "val": 0.05})
    source = divided(root, [(clip.key if protocol == "seen" else clip.speaker, clip) for clip in clips], split_of)
    times = {(_speaker(path), path.stem): path for path in find_files(root, ".align") if grid_sentence(path.stem)}
    if not times:
        return source

    def read(split: str) -> Iterator[SourceClip]:
        for clip in source.read(split):
            path = times.get((clip.speaker, Path(clip.video).stem))
            yield clip if path is None else replace(clip, phonemes=_words(root / path, clip.lag))

    letters = set("abcdefghijklmnopqrstuvxyz")  # no w
    symbols = letters.union(VERBS.values(), COLOURS.values(), PREPOSITIONS.values(), DIGITS.values(), ADVERBS.values())
    return replace(source, read=read, symbols=sorted(symbols))


def _speaker(path: Path) -> str | None:
    return next((part for part in path.parts if part[:1] == "s" and part[1:].isdigit()), None)


def _read_lags(path: Path) -> dict[str, float]:
    """Return the seconds in the column `lag` of a CSV file for each key in the column `clip`."""
    lags = {}
    for row in read_table(path, ("clip", "lag"), "source.lags"):
        try:
            lags[row["clip"]] = seconds = float(row["lag"])
        except ValueError:
            seconds = math.nan
        if not abs(seconds) <= LARGEST_LAG:
            raise UserError(f"source.lags={path}: the lag {row['lag']!r} of {row['clip']} is not a number up to 1 s")
    return lags


def _words(path: Path, lag: float) -> list[tuple[str, float, float]]:
    """Return the words of a file of lines `23750 29500 bin`, times in seconds without the lag of the audio; a file unit
    is 1/25,000 s.
    """
    rows = [line.split() for line in read_lines(path)]
    if not all(len(row) == 3 and row[0].isdigit() and row[1].isdigit() for row in rows):
        raise UserError(f"{path} is not a list of lines `start end word`: unpack alignments.zip again")
    return [(word, int(start) / ALIGNMENT_RATE - lag, int(end) / ALIGNMENT_RATE - lag) for start, end, word in rows]


def grid_sentence(name: str) -> str | None:
    """Return the six words that a name such as bbaf2n stands for; None for another name."""
    tables = (VERBS, COLOURS, PREPOSITIONS, None, DIGITS, ADVERBS)
    words = [(letter if letter.isalpha() else None) if table is None else table.get(letter)
             for table, letter in zip(tables, name.lower())]  # fmt: skip
    return " ".join(words) if len(name) == 6 and all(words) else None
