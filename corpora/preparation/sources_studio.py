"""Recordings of a studio, whose file names tell who says what and with which emotion: GRID, CREMA-D, RAVDESS.

None of them has an official split. Test and validation split are of speakers of their own. An emotion of the name is
the clip's label, as one of HiCoDiT's seven classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from corpora.preparation.clip import SourceClip, make_key
from corpora.preparation.sources import Unsplit

# GRID's six letters
VERBS = {"b": "bin", "l": "lay", "p": "place", "s": "set"}
COLOURS = {"b": "blue", "g": "green", "r": "red", "w": "white"}
PREPOSITIONS = {"a": "at", "b": "by", "i": "in", "w": "with"}
DIGITS = dict(zip("z123456789", ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]))
ADVERBS = {"a": "again", "n": "now", "p": "please", "s": "soon"}
CREMA_D_EMOTIONS = {
    "ANG": "angry", "DIS": "disgusted", "FEA": "fearful", "HAP": "happy", "NEU": "neutral", "SAD": "sad",
}  # fmt: skip
CREMA_D_SENTENCES = {
    "IEO": "it's eleven o'clock",
    "TIE": "that is exactly what happened",
    "IOM": "i'm on my way to the meeting",
    "IWW": "i wonder what this is about",
    "TAI": "the airplane is almost full",
    "MTI": "maybe tomorrow it will be cold",
    "IWL": "i would like a new alarm clock",
    "ITH": "i think i have a doctor's appointment",
    "DFA": "don't forget a jacket",
    "ITS": "i think i've seen this before",
    "TSI": "the surface is slick",
    "WSI": "we'll stop in a couple of minutes",
}
RAVDESS_EMOTIONS = {
    "01": "neutral", "02": "neutral", "03": "happy", "04": "sad", "05": "angry", "06": "fearful", "07": "disgusted",
    "08": "surprised",
}  # fmt: skip
RAVDESS_STATEMENTS = {"01": "kids are talking by the door", "02": "dogs are sitting by the door"}


class Studio(Unsplit):
    """The clips of such a data set, whose groups are its speakers."""

    def walk(self) -> Iterator[tuple[str, SourceClip]]:
        for clip in sorted(self.clips_of_names(), key=lambda clip: clip.source):
            yield clip.speaker, clip

    def clips_of_names(self) -> Iterator[SourceClip]:
        """All clips, in any order."""
        raise NotImplementedError

    def files(self, *suffixes: str) -> Iterator[Path]:
        """Files with one of the suffixes below the root, wherever its archives were unpacked, relative to it."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                if name.lower().endswith(suffixes):
                    yield (Path(folder) / name).relative_to(self.root)


class GRID(Studio):
    """ROOT/**/s1/**/bbaf2n.mpg, as the archives s1.zip to s34.zip unpack; the name spells the sentence.

    The sound is the video's: the files of audio_25k.zip lack the silence at both ends and are shorter. Tests are on
    speakers 1, 2, 20 and 22, as with LipNet (arXiv 1611.01599).
    """

    def __init__(self, root: str | Path, validation: float = 0.06) -> None:
        super().__init__(root, validation, customary=("s1", "s2", "s20", "s22"))

    def clips_of_names(self) -> Iterator[SourceClip]:
        for path in self.files(".mpg"):
            speaker = next((part for part in path.parts if part[:1] == "s" and part[1:].isdigit()), None)
            text = self.sentence(path.stem)
            if speaker is not None and text is not None:
                key = make_key(f"{speaker}-{path.stem}")
                yield SourceClip(key, path.as_posix(), text=text, speaker=speaker, language="en")

    @staticmethod
    def sentence(name: str) -> str | None:
        """The six words that a name such as bbaf2n stands for; None for another name."""
        tables = (VERBS, COLOURS, PREPOSITIONS, None, DIGITS, ADVERBS)
        words = [(letter if letter.isalpha() else None) if table is None else table.get(letter)
                 for table, letter in zip(tables, name.lower())]  # fmt: skip
        return " ".join(words) if len(name) == 6 and all(words) else None


class CREMAD(Studio):
    """ROOT/VideoFlash/1001_DFA_ANG_XX.flv, sound ROOT/AudioWAV/1001_DFA_ANG_XX.wav: actor, sentence, emotion, level."""

    def __init__(self, root: str | Path, test: float = 0.1, validation: float = 0.07) -> None:
        super().__init__(root, validation, test)

    def clips_of_names(self) -> Iterator[SourceClip]:
        sounds = {path.stem: path.as_posix() for path in self.files(".wav")}
        for path in self.files(".flv", ".mp4"):
            actor, sentence, emotion, *_ = [*path.stem.split("_"), "", "", ""]
            if actor.isdigit() and emotion in CREMA_D_EMOTIONS:
                yield SourceClip(
                    make_key(path.stem),
                    path.as_posix(),
                    sounds.get(path.stem),
                    text=CREMA_D_SENTENCES.get(sentence),
                    speaker=actor,
                    language="en",
                    expression=CREMA_D_EMOTIONS[emotion],
                )


class RAVDESS(Studio):
    """ROOT/**/Actor_01/01-01-03-01-02-01-01.mp4: modality, channel, emotion, intensity, statement, repetition, actor.

    Modality 01 has picture and sound. Calm counts as neutral.

    Args:
        songs: also take what is sung (channel 02).
    """

    def __init__(self, root: str | Path, test: float = 0.17, validation: float = 0.08, songs: bool = False) -> None:
        self.channels = ("01", "02") if songs else ("01",)
        super().__init__(root, validation, test)

    def clips_of_names(self) -> Iterator[SourceClip]:
        for path in self.files(".mp4"):
            parts = path.stem.split("-")
            if len(parts) == 7 and parts[0] == "01" and parts[1] in self.channels and parts[2] in RAVDESS_EMOTIONS:
                yield SourceClip(
                    make_key(path.stem),
                    path.as_posix(),
                    text=RAVDESS_STATEMENTS.get(parts[4]),
                    speaker=f"Actor_{parts[6]}",
                    language="en",
                    expression=RAVDESS_EMOTIONS[parts[2]],
                )
