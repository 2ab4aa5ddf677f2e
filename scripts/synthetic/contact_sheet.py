"""A picture that shows at a glance what the corpus looks like: identities by mouth shapes, expressions mixed."""

from __future__ import annotations

import numpy as np

from scripts.synthetic.expression import EXPRESSIONS, pose
from scripts.synthetic.face import Face, draw_motion
from scripts.synthetic.portrait import design
from scripts.synthetic.visemes import FPS, mouth_track
from scripts.synthetic.voices import load_voices

_SOUNDS = ("m", "f", "T", "s", "l", "S", "u:", "oU", "i:", "E", "a", "A:")
_STEP = 0.32  # s a sound


def contact_sheet(rows: int = 10) -> np.ndarray:
    """(rows * 128, 12 * 128, 3) uint8 RGB: one identity and expression a row, one sound a column."""
    voices = load_voices()
    chosen = [voices[i * len(voices) // rows] for i in range(rows)]
    phonemes = [(sound, i * _STEP, (i + 1) * _STEP) for i, sound in enumerate(_SOUNDS)]
    frames = round(len(_SOUNDS) * _STEP * FPS)
    track = mouth_track(phonemes, frames)
    shown = [int((i + 0.5) * _STEP * FPS) for i in range(len(_SOUNDS))]
    sheet = []
    for row, voice in enumerate(chosen):
        rng = np.random.default_rng(row)
        motion = draw_motion(rng, frames, np.zeros(frames))
        face = Face(design(voice.face_seed, voice.pitch, voice.formants))
        video = face.render(track, pose(EXPRESSIONS[row % len(EXPRESSIONS)], 1.0), motion)
        sheet.append(np.concatenate([video[i] for i in shown], 1))
    return np.concatenate(sheet)
