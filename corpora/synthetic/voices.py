"""The corpus's voices.

Version 1: `voices.json` keeps 40 espeak-ng voice files that were drawn at random and chosen with GE2E and a recogniser,
then weeded by hand; its `arguments`, `by_hand` and `results` say how, and what was measured.

Versions 2 and 3: `voices_v2.json` keeps seeds alone. Voice and face follow from them (`traits`). They are the first
seeds whose voice a recogniser understands in the three hardest prosodies (6 % word errors at most) and whose face
OpenCV's cascade finds with every expression. The voices of the splits unseen and dev are those that GE2E tells apart
best (farthest points)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from corpora.synthetic.portrait import Identity, design
from corpora.synthetic.traits import Traits, draw_traits, looks, voice_lines

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Voice:
    """One identity.

    Attributes:
        number: counted from 0; training voices come first.
        group: "train", "unseen" (heard in that test split alone), "dev" (in that split alone) or "more"
            (further voices for training).
        lines: of the espeak-ng voice file.
        face: what the voice looks like.
        traits: what voice and face share; None in version 1.
    """

    number: int
    group: str
    lines: str
    face: Identity
    traits: Traits | None = None


def load_voices(version: int = 1, more: int = 0) -> list[Voice]:
    """All voices of a version, in the order of their numbers.

    Args:
        more: number of further voices of versions 2 and 3, group "more", of the next seeds. They are not checked: some
            are hard to understand, and OpenCV finds some of their faces not at all.
    """
    if version == 1:
        return [
            Voice(
                row["number"],
                "unseen" if row["held_out"] else "train",
                row["lines"],
                design(row["face_seed"], row["pitch"], row["formants"]),
            )
            for row in json.loads((_FOLDER / "voices.json").read_text())["voices"]
        ]
    groups = json.loads((_FOLDER / "voices_v2.json").read_text())
    first = max(seed for seeds in groups.values() for seed in seeds) + 1
    groups["more"] = range(first, first + more)
    drawn = [(group, seed, draw_traits(seed)) for group, seeds in groups.items() for seed in seeds]
    return [Voice(i, group, voice_lines(t), looks(t, seed), t) for i, (group, seed, t) in enumerate(drawn)]
