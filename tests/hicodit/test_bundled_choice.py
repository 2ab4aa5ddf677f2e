"""The choice between the two bundled releases, by the face, and the remark about a face unlike those of training."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_faces import talking_head

from hicodit.bundled import CARTOON_RELEASE, REAL_RELEASE, PipelineChooser, bundled_weights
from hicodit.people import KnownPeople, face_features
from scripts import known_people
from tests.shard_files import write_split

DEMO = Path(__file__).parents[2] / "assets/demo"


@pytest.mark.parametrize("clip", sorted(DEMO.glob("*.mp4")), ids=lambda path: path.stem)
def test_drawn_faces_get_the_release_for_drawn_faces(clip):
    assert bundled_weights(clip) == CARTOON_RELEASE


def test_camera_noise_tells_a_filmed_face():
    drawn = np.stack(talking_head(12))
    noise = np.random.default_rng(0).normal(0, 4, drawn.shape)
    filmed = np.clip(drawn + noise, 0, 255).astype(np.uint8)
    assert bundled_weights(drawn) == CARTOON_RELEASE
    assert bundled_weights(filmed) == REAL_RELEASE


def test_clip_without_a_face_gets_the_release_for_filmed_faces():
    assert bundled_weights(np.zeros((30, 96, 96, 3), np.uint8)) == REAL_RELEASE


def test_pipelines_are_loaded_once_and_given_weights_are_for_all_clips():
    loaded = []

    def load(weights):
        loaded.append(weights)
        return len(loaded)

    drawn = np.stack(talking_head(12))
    filmed = np.zeros((12, 96, 96, 3), np.uint8)
    chooser = PipelineChooser(load)
    assert [chooser.for_clip(clip) for clip in (drawn, filmed, drawn)] == [1, 2, 1]
    assert chooser.load_all() == [1, 2] and loaded == [CARTOON_RELEASE, REAL_RELEASE]
    given = PipelineChooser(load, "mine")
    assert given.for_clip(drawn) == given.for_clip(filmed) == 3 and loaded[2:] == ["mine"]


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
    assert all("unlike" in stored.remark(pictures(person, 0)) for person in (4, 5))
    assert KnownPeople.from_release(tmp_path / "nowhere") is None


def test_clips_without_faces_describe_nobody(tmp_path, monkeypatch, capsys):
    samples = []
    for number in range(4):
        info = {"key": f"k{number}", "frames": 4, "speaker": number % 2}
        tensors = {"faces": torch.from_numpy(pictures(number % 2, number))} if number < 3 else {"wave": torch.zeros(1)}
        samples.append((info, tensors))
    write_split(tmp_path / "train", samples, 2)
    monkeypatch.setattr(sys, "argv", ["known_people.py", str(tmp_path), str(tmp_path)])
    known_people.main()
    assert "2 people of 3 clips" in capsys.readouterr().out
    assert len(KnownPeople.from_release(tmp_path).means) == 2
