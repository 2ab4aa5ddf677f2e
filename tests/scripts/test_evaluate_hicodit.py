"""Whose voice an output has."""

import numpy as np
import pytest

from scripts.evaluate_hicodit import identity


class Vectors:
    """Waves are GE2E vectors themselves."""

    @staticmethod
    def voices(waves):
        return np.stack(waves).astype(np.float32)


A, B, C = np.eye(3)


def test_a_clip_is_no_witness_of_its_own_voice():
    true, voices = [A, A, B, C], [1, 1, 2, 3]
    found = identity(Vectors, true, [A, B, B, C], true, voices, known=None)
    assert found["voice_first_clean"] == 1 and found["voice_first"] == 0.5  # of the two clips whose voice has another
    assert found["voice_similarity"] == pytest.approx(0.5)
    assert identity(Vectors, [A, B], [A, B], [A, B], [1, 2], known=None) == {}


def test_known_voices_need_no_other_clip():
    found = identity(Vectors, [A, B], [A, A], [A, B], [1, 2], known={1: A, 2: B, 3: C})
    assert (found["voices"], found["voice_first"], found["voice_first_resynthesis"]) == (3, 0.5, 1)
