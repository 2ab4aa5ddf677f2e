"""The reading of mouth openings from pictures, on voices and mouth tracks that its fit never saw."""

import numpy as np
import pytest

from corpora.synthetic.expression import pose
from corpora.synthetic.face import Face, draw_motion
from corpora.synthetic.mouth_opening import MouthReader
from corpora.synthetic.visemes import MOUTH, mouth_track
from corpora.synthetic.voices import load_voices

PHONEMES = [("b", 0.15, 0.2), ("I", 0.2, 0.35), ("n", 0.35, 0.45)]
PHONEMES += [("w", 0.45, 0.55), ("aI", 0.55, 0.8), ("t", 0.8, 0.9)]


def clip(voice, expression, seed):
    track = mouth_track(PHONEMES, 26)
    motion = draw_motion(np.random.default_rng(seed), 26, np.linspace(0, 1, 26))
    frames = Face(voice.face).render(track, pose(expression, 0.9), motion)
    return frames, track[:, MOUTH.index("open")]


@pytest.mark.parametrize("expression", ["neutral", "happy", "sad", "disgusted"])
def test_readings_follow_the_drawn_opening(expression):
    reader = MouthReader(24)
    unseen = [voice for voice in load_voices() if voice.group == "unseen"]
    for voice in unseen[:3] + unseen[-3:]:
        frames, opening = clip(voice, expression, voice.number)
        assert np.corrcoef(reader(frames), opening)[0, 1] > 0.9
