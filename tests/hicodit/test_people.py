"""A face that is unlike those of the training clips gets a remark."""

import numpy as np

from hicodit.people import KnownPeople, face_features


def pictures(person: int, seed: int) -> np.ndarray:
    """Return four noisy face crops (4, 64, 64, 3) of a made-up person, at some brightness."""
    face = np.kron(np.random.default_rng(person).uniform(60, 180, (8, 8, 1)), np.ones((8, 8, 3)))
    rng = np.random.default_rng([person, seed])
    return (rng.uniform(0.7, 1.2) * face + rng.normal(0, 12, (4, 64, 64, 3))).clip(0, 255).astype(np.uint8)


def test_known_faces_have_no_remark_and_others_have_one(tmp_path):
    clips = [(person, seed) for person in (1, 2, 3) for seed in range(12)]
    people = KnownPeople.from_clips([face_features(pictures(*clip)) for clip in clips], [str(p) for p, _ in clips])
    people.save(tmp_path)
    stored = KnownPeople.from_release(tmp_path)
    assert all(stored.remark(pictures(person, 99)) == "" for person in (1, 2, 3))
    assert all("unlike those of the training clips" in stored.remark(pictures(person, 0)) for person in (4, 5))
    assert KnownPeople.from_release(tmp_path / "nowhere") is None
