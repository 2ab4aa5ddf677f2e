"""Voices of the synthetic corpus and their faces.

`voices_v2.json` contains only seeds, which determine five traits of voice and face. Each lies between 0 and 1
and moves what is heard and what is seen monotonically, so that a model can learn from a few hundred voices how an
unknown face sounds. Attributes that are independent of the voice (skin, hair style, glasses, freckles, shirt,
background) are drawn separately. The seeds are the first whose voice a recogniser understands in the three hardest
prosodies (6 % word errors at most) and whose face OpenCV's cascade finds with every expression. The voices of the
splits unseen and dev are those that GE2E distinguishes best (farthest points).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from corpora.synthetic.portrait import Identity, hsv, mix, rgb

_FOLDER = Path(__file__).parent
_SKINS = ((246, 212, 184), (240, 200, 168), (231, 184, 143), (212, 158, 115), (184, 128, 88), (150, 100, 68))
_EYES = ((92, 60, 36), (60, 92, 140), (72, 110, 76), (110, 120, 130), (56, 40, 30))
_HAIR_STYLES = "buzz", "short", "side", "curly", "bob", "bun"
_HAIR = np.array([(34, 24, 20), (112, 66, 34), (226, 184, 108)])  # RGB by brightness: 0, 0.5, 1
_PITCH_RANGE = 1.7  # of every voice, so that expressions alone decide how far the pitch moves


@dataclass(frozen=True)
class Traits:
    """Traits that affect both the voice and the face.

    Attributes:
        depth: base pitch from 200 Hz down to 75 Hz; a rounder or squarer jaw, thin or heavy brows, full or narrow lips,
            and from 0.65 on a beard.
        tract: length of the vocal tract, all formants from 1.16 down to 0.88 of espeak-ng's; a small or large head.
        front: second and third formant 7 % nearer to 5 % further apart; distance of the eyes, breadth of the nose.
        bright: spectral tilt from dull to sharp; dark to fair hair.
        age: formants from narrow to wide, which sounds clear or muffled; hair turns grey, and the hairline goes up.
    """

    depth: float
    tract: float
    front: float
    bright: float
    age: float


def draw_traits(seed: int) -> Traits:
    """Draw the traits of a voice, uniform in [0, 1]."""
    return Traits(*np.random.default_rng([seed, 0x7EA17]).random(5).round(4).tolist())


def voice_lines(traits: Traits) -> str:
    """Return the lines of an espeak-ng voice file."""
    pitch = 200 * (75 / 200) ** traits.depth
    formants = 100 * (1.16 - 0.28 * traits.tract)
    spread = 0.12 * (traits.front - 0.6)
    tilt = 100 * (traits.bright - 0.7)
    lines = [f"pitch {pitch:.0f} {pitch * _PITCH_RANGE:.0f}", "flutter 1", "voicing 85", "consonants 130 130"]
    for number, scale in enumerate((1, 1 - spread, 1 + spread, 1 + spread / 2, 1, 1)):
        lines.append(f"formant {number} {formants * scale:.0f} 100 {95 + 85 * traits.age:.0f}")
    lines.append(f"tone 600 {150 - tilt:.0f} 1200 125 2000 {110 + tilt:.0f} 3000 {105 + 1.3 * tilt:.0f}")
    return "\n".join(lines)


def looks(traits: Traits, seed: int) -> Identity:
    """Create a face that shows the traits. Other attributes are drawn from the seed."""
    depth = traits.depth
    tract = traits.tract
    age = traits.age
    fair = [np.interp(traits.bright, (0, 0.5, 1), _HAIR[:, channel]) for channel in range(3)]
    grey = 40 + 170 * (0.25 + 0.5 * traits.bright)
    drawn = _draw_looks(seed)
    return Identity(
        half_width=27.5 + 9.5 * tract,
        chin=104.5 + 9.0 * tract,
        top=28.0 - 9.0 * tract,
        jaw=1.06 - 0.44 * depth,
        brow=1.0 + 3.2 * depth,
        lip=5.4 - 2.6 * depth,
        lip_colour=mix(mix(drawn["skin"], (120, 70, 66), 0.35), (206, 36, 66), 0.75 * (1 - depth)),
        beard=float(np.clip((depth - 0.65) / 0.35, 0, 1)),
        eye_gap=12.0 + 3.4 * traits.front + 2.4 * tract,
        eye_size=7.6 - 0.6 * depth,
        nose_width=4.2 + 5.2 * traits.front,
        nose_length=14.5 + 4.0 * tract,
        mouth_width=15.0 + 1.8 * tract,
        mouth_y=90.0 + 2.0 * tract,
        hair=mix(fair, (grey, grey, grey), max(0.0, 1.25 * age - 0.25)),
        hairline=0.66 - 0.36 * age,
        **drawn,
    )


def _draw_looks(seed: int) -> dict[str, Any]:
    """Draw the entries of `Identity` that do not depend on the traits.

    Random numbers without a use are drawn so that all others, and thus the faces of existing corpora, stay the same.
    """
    rng = np.random.default_rng([seed, 0xFACE])
    skin = np.array(_SKINS[int(np.clip(rng.normal(2.6, 1.0), 0, 5))]) * rng.normal(1, 0.03) + rng.normal(0, 1.8, 3)
    rng.integers(6)
    rng.random()
    rng.integers(5)
    rng.random()
    hue = rng.uniform(0, 180)
    rng.normal(size=7)
    rng.random(2)
    eye = _EYES[int(rng.integers(5))]
    rng.normal(size=6)
    return {
        "skin": rgb(np.minimum(skin, 246)),
        "hair_style": str(np.random.default_rng([seed, 0x100C5]).choice(_HAIR_STYLES)),
        "eye": eye,
        "glasses": bool(rng.random() < 0.25),
        "freckles": int(rng.integers(14, 34)) if rng.random() < 0.22 else 0,
        "ears": rng.uniform(4.2, 6.4),
        "shirt": hsv(hue + rng.uniform(50, 130), rng.uniform(90, 190), rng.uniform(80, 210)),
        "back": hsv(hue, rng.uniform(25, 80), rng.uniform(205, 235) if skin.mean() < 165 else rng.uniform(105, 150)),
        "detail_seed": int(rng.integers(2**31)),
    }


@dataclass(frozen=True)
class Voice:
    """A voice and its face.

    Attributes:
        number: counted from 0; training voices come first.
        group: "train", "unseen" (used only in that test split), "dev" (only in that split) or "more"
            (further voices for training).
        lines: contents of the espeak-ng voice file.
        face: appearance of the face.
        traits: traits that affect both.
    """

    number: int
    group: str
    lines: str
    face: Identity
    traits: Traits


def load_voices(more: int = 0) -> list[Voice]:
    """Return all voices in the order of their numbers.

    Args:
        more: number of further voices, group "more", of the next seeds. They are not checked: some are hard to
            understand, and OpenCV does not find some of their faces.
    """
    groups = json.loads((_FOLDER / "voices_v2.json").read_text())
    first = max(seed for seeds in groups.values() for seed in seeds) + 1
    groups["more"] = range(first, first + more)
    drawn = [(group, seed, draw_traits(seed)) for group, seeds in groups.items() for seed in seeds]
    return [Voice(i, group, voice_lines(t), looks(t, seed), t) for i, (group, seed, t) in enumerate(drawn)]
