"""Shards of visual features: what lies in them, which clips they leave out, and when they are made again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from drawn_faces import talking_head
from safetensors.torch import load_file

from engine.errors import UserError
from engine.faces.detectors import HaarDetector
from engine.faces.track import track_face
from engine.media.audio import write_wav
from engine.media.video import read_video, write_video
from hicodit import features
from hicodit.conditions.encoders import TinyEncoderConfig
from hicodit.features import (
    FeatureSplit,
    drop_shards_beyond,
    make_token_shard,
    make_visual_shard,
    phoneme_labels,
    shard_is_made,
)
from rvq_codec import RVQCodec

FRAMES = {"one": 12, "blank": 10, "two": 17}
SYMBOLS = ["a", "m"]
SIZES = TinyEncoderConfig()


class LoudnessAsVoice:
    """Stands in for GE2E: every voice is its clip's loudness, 256 times."""

    def embed(self, wave: np.ndarray, rate: int) -> np.ndarray:
        return np.full(256, np.sqrt(np.mean(np.square(wave))), np.float32)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Two talking heads and, between them, a clip without a face."""
    monkeypatch.setattr(features, "GE2EEncoder", LoudnessAsVoice)
    root, rows = tmp_path / "corpus", []
    for i, (name, count) in enumerate(FRAMES.items()):
        frames = np.full((count, 128, 128, 3), 128, np.uint8) if name == "blank" else talking_head(count)
        write_video(root / "train" / f"{name}.mp4", frames, 25)
        noise = np.random.default_rng(i).standard_normal(960 * count)
        write_wav(root / "train" / f"{name}.wav", 0.1 * (i + 1) * noise, 24_000)
        phonemes = [["m", 0.0, 0.2], ["a", 0.2, 0.4]]
        rows.append({"id": name, "text": f"text {i}", "voice": i, "expression": "sad", "phonemes": phonemes})
    write_rows(root, rows)
    return root


def write_rows(root, rows):
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(corpus, out):
    return make_visual_shard(corpus, "train", 0, out, SIZES, SYMBOLS)


def test_a_shard_holds_every_clip_in_a_row_and_leaves_out_what_shows_no_face(corpus, tmp_path):
    out = tmp_path / "features"
    skipped = make(corpus, out)
    assert [name for name, _ in skipped] == ["blank"] and "face" in skipped[0][1]
    shard = load_file(out / "train" / "visual-00000.safetensors")
    side, picture = SIZES.mouth_size, SIZES.face_size
    shapes = {"mouth": (29, side, side), "faces": (2, 4, picture, picture, 3), "ge2e": (2, 256), "phoneme": (29,)}
    assert {name: tuple(shard[name].shape) for name in shapes} == shapes
    assert shard["frames"].tolist() == [12, 17] and shard["expression"].tolist() == [2, 2]
    listing = json.loads((out / "train" / "visual-00000.json").read_text())
    assert [clip["id"] for clip in listing["clips"]] == ["one", "two"] and listing["clips"][1]["voice"] == 2
    assert shard["phoneme"][:12].tolist() == [2] * 5 + [1] * 5 + [0] * 2

    frames = read_video(corpus / "train" / "two.mp4", 25)
    track = track_face([frames], HaarDetector())
    assert np.array_equal(shard["mouth"][12:].numpy(), SIZES.cut_mouth(frames, track))
    loudness = shard["ge2e"][:, 0]
    assert float(loudness[1] / loudness[0]) == pytest.approx(3, rel=0.05)  # the third clip's voice, not the second's


def test_shards_are_kept_until_the_clips_or_phonemes_change(corpus, tmp_path):
    out = tmp_path / "features"
    first = make(corpus, out)
    path = out / "train" / "visual-00000.safetensors"
    made = path.stat().st_mtime_ns
    assert make(corpus, out) == first and path.stat().st_mtime_ns == made
    tokens = path.with_name("tokens-01234567-00000.safetensors")
    tokens.write_bytes(b"of the old clips")
    assert not shard_is_made(corpus, "train", 0, out, ["a"], None)
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    write_rows(corpus, rows[:2])
    assert not shard_is_made(corpus, "train", 0, out, SYMBOLS, None)
    make(corpus, out)
    assert load_file(path)["frames"].tolist() == [12]
    assert not tokens.exists()  # they belonged to other clips


def test_shards_of_a_corpus_that_was_larger_are_deleted(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SHARD_CLIPS", 1)
    out, codec = tmp_path / "features" / "train", "tokens-01234567"
    for index in (0, 2):
        make_visual_shard(corpus, "train", index, out.parent, SIZES, SYMBOLS)
        (out / f"{codec}-{index:05d}.safetensors").touch()
    assert drop_shards_beyond(corpus, "train", out.parent) == 0
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    write_rows(corpus, rows[:2])
    assert drop_shards_beyond(corpus, "train", out.parent) == 1
    assert sorted(path.name for path in out.iterdir()) == [
        f"{codec}-00000.safetensors",
        "visual-00000.json",
        "visual-00000.safetensors",
    ]
    assert drop_shards_beyond(corpus, "train", tmp_path / "none yet") == 0


def test_a_split_without_any_face_is_refused(corpus, tmp_path):
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    write_rows(corpus, rows[1:2])
    with pytest.raises(UserError, match="blank"):
        make(corpus, tmp_path / "features")


def test_clips_come_back_whole(corpus, tmp_path, release):
    out, codec = tmp_path / "features", RVQCodec.from_pretrained(release.parent / "codec")
    make(corpus, out)
    make_token_shard(corpus, "train", 0, out, codec)
    split = FeatureSplit(out / "train", codec.digest())
    shard = load_file(out / "train" / "visual-00000.safetensors")
    assert len(split) == 2
    clip = split[1]
    assert clip.info["id"] == "two" and clip.expression == 2
    assert torch.equal(clip.mouth, shard["mouth"][12:]) and torch.equal(clip.phoneme, shard["phoneme"][12:].long())
    assert clip.tokens.shape == (34, codec.levels)


def test_phonemes_are_labelled_at_frame_centres():
    spans = [["a", 0.019, 0.061], ["m", 0.061, 0.3], ["?", 0.0, 0.3]]  # centres: 0.02, 0.06, 0.1, 0.14
    assert phoneme_labels(spans, 4, SYMBOLS).tolist() == [1, 1, 2, 2]
