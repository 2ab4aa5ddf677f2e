"""The three codecs train from prepared shards, and leave out what cannot be used."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from corpora.preparation.job import prepare
from engine.config import load as load_config
from engine.errors import UserError
from engine.evaluation.validation import Share
from engine.instantiate import build
from engine.media.audio import read_audio, write_wav
from engine.media.video import write_video
from engine.shards.recordings import SpeechCrops, load_waves
from engine.training.batches import MicroBatches
from lia_x.data import FramePairs, held_out_frames
from tests.drawn_faces import draw_face

FRAMES = (30, 1, 40)  # of the clips; the second gives no pair of pictures


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    root = tmp_path_factory.mktemp("footage")
    voice = np.tile(read_audio("assets/demo/voice.wav", 24_000), 3)
    rows = ["path,audio,text"]
    for i, frames in enumerate(FRAMES):
        write_video(root / f"c{i}.mp4", np.stack([draw_face(t % 7 / 7) for t in range(frames)]), 25)
        write_wav(root / f"c{i}.wav", voice[: frames * 960], 24_000)
        rows.append(f"c{i}.mp4,c{i}.wav,hello {i}")
    (root / "clips.csv").write_text("\n".join(rows))
    return root


@pytest.fixture(scope="module")
def shards(footage, tmp_path_factory):
    """Of both recipes in one folder: the second is added to the first."""
    root = tmp_path_factory.mktemp("shards")
    common = ["source=folder", f"source.root={footage}", f"output={root}", "stages.decode.min_seconds=0", "workers=0"]
    prepare(load_config("prepare", [*common, "features=speech_codecs", "device=cpu"]))
    more = ["features=lia_x_paper", "stages.wave.use=true", "stages.portraits.size=64", "stages.portraits.pictures=5"]
    prepare(load_config("prepare", [*common, *more, f"reuse={root}", "device=cpu"]))
    return root


def recipe(name, shards, *more):
    words = [f"experiment={name}", f"data.root={shards}", "data.held_out=[train]", *more]
    return load_config("train", words)


@pytest.mark.parametrize("name", ["rvq_paper", "whisperx_vae_paper"])
def test_the_recipes_of_speech_codecs_read_waves_from_shards(footage, shards, name):
    config = recipe(name, shards)
    data = build(config.data.train)
    batch = MicroBatches(data, 2, 0)[0]["wave"]
    assert len(data) == 2 and batch.shape == (2, 1, data.samples)
    whole = SpeechCrops(shards, samples=960, gain_db=0.0).waves.read(1)
    true = read_audio(footage / "c2.wav", 24_000)
    assert np.abs(whole.numpy() - true[: len(whole)]).max() < 1e-4
    waves = load_waves(config.task.validation.root, "train", 5, 24_000)
    assert [len(wave) for wave in waves] == [30 * 960, 40 * 960]


def test_the_recipe_of_lia_x_reads_pictures_from_shards(shards):
    data = build(recipe("lia_x_paper", shards, "task.vgg=v", "task.codec.size=32").data.train)
    pair = data.load(0, torch.Generator().manual_seed(0))["frames"]
    assert len(data) == 2 and pair.shape == (2, 32, 32, 3) and not torch.equal(pair[0], pair[1])
    clips = dict(held_out_frames(shards, "train", 4, 32, Share()))
    assert [frames.shape for frames in clips.values()] == [(5, 32, 32, 3)] * 2


def test_movements_of_real_faces_belong_to_the_frames(shards, monkeypatch):
    def landmarks(frames):
        if clips.pop():
            raise UserError("dlib detects no face in the first frame")
        return frames

    clips = [True, False]  # dlib detects no face in the second
    monkeypatch.setattr("lia_x.data.LandmarkReader", lambda: SimpleNamespace(landmarks=landmarks))
    measures = {"open": lambda frames: frames.mean((1, 2, 3)), "blink": lambda frames: frames[:, 0, 0, 0]}
    monkeypatch.setattr("lia_x.data.MEASURES", measures)
    pairs = FramePairs(shards, 32, tracks={"open": 0.1, "blink": 2.0})
    item = pairs.load(0, torch.Generator().manual_seed(0))
    frames = item["frames"].float()
    torch.testing.assert_close(item["tracks"], torch.stack([0.1 * frames.mean((1, 2, 3)), 2 * frames[:, 0, 0, 0]], 1))
    assert item["tracks"][0, 0] != item["tracks"][1, 0]
    assert pairs.load(1, torch.Generator().manual_seed(0))["tracks"].isnan().all()
    with pytest.raises(UserError, match=r"only \['open', 'blink'\] can be measured"):
        FramePairs(shards, 32, tracks={"open": 1.0, "width": 1.0})


def test_unreadable_recordings_are_skipped_and_counted(footage, tmp_path, capsys):
    (tmp_path / "train").mkdir()
    for name in ("a", "b", "c"):
        for suffix in ("wav", "mp4"):
            data = (footage / f"c0.{suffix}").read_bytes() if name != "b" else b"<html>not found</html>"
            (tmp_path / "train" / f"{name}.{suffix}").write_bytes(data)
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"id": name, "text": ""}) for name in "abc"))
    crops = SpeechCrops(tmp_path, samples=4_800)
    for index in (1, 1, 0):
        assert crops.load(index, torch.Generator().manual_seed(0))["wave"].shape == (1, 4_800)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "clip b is left out" in lines[0]
    assert len(load_waves(tmp_path, "train", 3, 24_000)) == 2
    assert "clip b is left out" in capsys.readouterr().err
    pairs = FramePairs(tmp_path, 32, tmp_path / "cache", frames=4)
    assert len(pairs) == 2 and "clip b is left out" in capsys.readouterr().err
    again = FramePairs(tmp_path, 32, tmp_path / "cache", frames=4)
    one, two = (data.load(1, torch.Generator().manual_seed(0))["frames"] for data in (pairs, again))
    assert len(again) == 2 and torch.equal(one, two) and one.any()
