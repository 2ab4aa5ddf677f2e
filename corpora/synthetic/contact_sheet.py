"""A picture that shows at a glance what the corpus looks like: identities by mouth shapes, expressions mixed."""

from __future__ import annotations

import numpy as np

from corpora.synthetic.expression import EXPRESSIONS, pose
from corpora.synthetic.face import Face, Motion, draw_motion
from corpora.synthetic.visemes import FPS, mouth_track
from corpora.synthetic.voices import load_voices

SOUNDS = ("m", "f", "T", "s", "l", "S", "u:", "oU", "i:", "E", "a", "A:")
_STEP = 0.32  # s a sound


def contact_sheet(version: int, rows: int = 10, sounds: tuple[str, ...] = SOUNDS) -> np.ndarray:
    """One identity and expression a row, one espeak-ng phoneme a column: (rows * 128, sounds * 128, 3) uint8 RGB."""
    voices = load_voices(version)
    chosen = [voices[i * len(voices) // rows] for i in range(rows)]
    phonemes = [(sound, i * _STEP, (i + 1) * _STEP) for i, sound in enumerate(sounds)]
    frames = round(len(sounds) * _STEP * FPS)
    shown = [int((i + 0.5) * _STEP * FPS) for i in range(len(sounds))]
    track = mouth_track(phonemes, frames)[shown]
    sheet = []
    for row, voice in enumerate(chosen):
        motion = draw_motion(np.random.default_rng(row), frames, np.zeros(frames))
        motion = Motion(*(values[shown] for values in vars(motion).values()))
        face = Face(voice.face)
        sheet.append(np.concatenate(face.render(track, pose(EXPRESSIONS[row % len(EXPRESSIONS)], 1.0), motion), 1))
    return np.concatenate(sheet)
