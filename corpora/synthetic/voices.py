"""The corpus's voices: espeak-ng voice files drawn at random, chosen so that a speaker encoder tells them apart.

`voices.json` keeps the voices that the corpus uses, and its `arguments` and `by_hand` how they were chosen:
1. `python -m corpora.synthetic.choose_voices --out FILE` with its defaults drew 180 voices and chose 48 of them, 40 for
   training and 8 held out.
2. By hand, eight of the 40 were dropped that the recogniser had understood badly in a test with all expressions, the
   rest were numbered anew, and each number got the first look that a face detector finds (`face.find_face_seed`).
`results` holds what was measured of the final choice. The command draws the same 180 voices again, but may choose
others of them: the kept choice was made before espeak-ng's noise was seeded, when a breathy voice differed a little
from run to run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VOICES_FILE = Path(__file__).with_name("voices.json")


@dataclass(frozen=True)
class Voice:
    """One identity: its number, whether training may use it, its espeak-ng voice file, the traits that its face shows
    (pitch in Hz, formant scale), and the seed of the rest of its looks."""

    number: int
    held_out: bool
    lines: str
    pitch: float
    formants: float
    face_seed: int

    @property
    def name(self) -> str:
        return f"corpus{self.number:02d}"


def load_voices(path: Path = VOICES_FILE) -> list[Voice]:
    """All voices, in the order of their numbers."""
    return [Voice(**entry) for entry in json.loads(Path(path).read_text())["voices"]]


def draw_voice(seed: int) -> tuple[str, float, float]:
    """A random voice: the lines of its espeak-ng voice file, its base pitch in Hz and its overall formant scale."""
    rng = np.random.default_rng([seed, 0x5EED])
    high = rng.random() < 0.5
    pitch = rng.uniform(150, 235) if high else rng.uniform(72, 135)
    formants = rng.uniform(0.98, 1.2) if high else rng.uniform(0.84, 1.06)
    span = pitch * rng.uniform(1.2, 1.6)
    lines = [f"pitch {pitch:.0f} {span:.0f}", f"flutter {rng.integers(0, 6)}"]
    for number in range(6):
        scale = 100 * formants * rng.normal(1.0, 0.035)
        width = 100 * rng.uniform(0.75, 1.5)
        lines.append(f"formant {number} {scale:.0f} {rng.uniform(70, 140):.0f} {width:.0f}")
    if rng.random() < 0.45:
        lines.append(f"klatt {rng.integers(1, 6)}")
    if rng.random() < 0.5:
        lines.append("breath 0 " + " ".join(str(rng.integers(0, 8)) for _ in range(6)))
    if rng.random() < 0.3:
        lines.append(f"roughness {rng.integers(1, 4)}")
    lines.append(f"voicing {rng.integers(70, 125)}")
    lines.append(f"consonants {rng.integers(70, 130)} {rng.integers(70, 130)}")
    tilt = rng.normal(0, 28)
    lines.append(f"tone 600 {150 - tilt:.0f} 1200 {125:.0f} 2000 {110 + tilt:.0f} 3000 {105 + 1.3 * tilt:.0f}")
    return "\n".join(lines), float(pitch), float(formants)
