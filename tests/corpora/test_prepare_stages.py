"""The stages with the bundled networks: what they make of a clip is what the direct paths of both models make."""

import json

import numpy as np
import pytest
import torch
from drawn_faces import draw_face
from omegaconf import OmegaConf
from safetensors.torch import load, load_file

from corpora.preparation.job import chosen_stages
from corpora.preparation.sources import Synthetic
from corpora.preparation.worker import Setup, Task, build_stages, collect_digests, process
from engine.config import load as load_config
from engine.errors import UserError
from engine.media.audio import read_audio, write_wav
from engine.media.video import write_video
from engine.shards.writer import read_members
from hicodit.conditions.released import encoder_config
from hicodit.features import FeatureSplit, make_token_shard, make_visual_shard
from rvq_codec import RVQCodec
from talker_t2av.features import FeatureEncoders, feature_path, make_features

FRAMES = 30
TALKER = ("assets/whisperx_vae_tiny", "assets/lia_x_tiny", "assets/voice_tiny")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    wave = np.tile(read_audio("assets/demo/voice.wav", 24_000), 2)
    row = {"id": "a", "text": "hello", "voice": 3, "expression": "sad", "phonemes": [["h", 0.1, 0.2], ["oU", 0.2, 0.9]]}
    write_video(root / "train" / "a.mp4", np.stack([draw_face(i % 7 / 7) for i in range(FRAMES)]), 25)
    write_wav(root / "train" / "a.wav", wave[: FRAMES * 960], 24_000)
    (root / "train.jsonl").write_text(json.dumps(row) + "\n")
    return root


def test_the_stages_make_what_the_direct_paths_make(corpus, tmp_path):
    pytest.importorskip("resemblyzer")
    source = Synthetic(corpus)
    config = load_config(
        "prepare", [f"source.root={corpus}", "output=x", "device=cpu", "stages.media.use=true"], "help"
    )
    stages = build_stages(Setup(chosen_stages(config, source), "cpu", source.symbols))
    outcome = process(Task(source.clips("train")[0], corpus, tmp_path), stages)
    assert outcome.stage == "", outcome.reason
    assert set(outcome.seconds) == {*stages, "write"} and outcome.frames == FRAMES
    members = {suffix: data for suffix, _, data in read_members((tmp_path / "a.tar").read_bytes())}
    assert list(members) == ["json", "safetensors", "mp4", "wav"]
    facts, made = json.loads(members["json"]), load(members["safetensors"])
    assert facts["frames"] == FRAMES and facts["seconds"] == FRAMES / 25 and facts["speaker"] == "3"

    codec = RVQCodec.from_pretrained("assets/rvq_tiny")
    make_visual_shard(corpus, "train", 0, tmp_path / "features", encoder_config({}), source.symbols)
    make_token_shard(corpus, "train", 0, tmp_path / "features", codec)
    direct = FeatureSplit(tmp_path / "features" / "train", codec.digest())[0]
    for name in ("mouth", "faces", "ge2e"):
        assert torch.equal(made[name], getattr(direct, name)), name
    assert torch.equal(made["tokens"].long(), direct.tokens) and torch.equal(made["phoneme"].long(), direct.phoneme)
    assert int(made["expression"]) == direct.expression
    assert (made["tokens"].dtype, made["phoneme"].dtype, made["ge2e"].dtype) == (
        torch.int16,
        torch.uint8,
        torch.float32,
    )

    encoders = FeatureEncoders.load(*TALKER)
    assert list(make_features(tmp_path, corpus, "train", ["a"], encoders)) == [("a", "")]
    for name, value in load_file(feature_path(tmp_path, "train", "a")).items():
        torch.testing.assert_close(made[name], value, atol=2e-3, rtol=0)
        assert made[name].dtype == torch.float16
    digests = {"rvq": codec.digest()}
    digests |= dict(zip(("whisperx_vae", "lia_x", "speaker"), encoders.digests().values()))
    assert digests.items() <= collect_digests(stages).items()


def test_stages_that_need_the_face_are_refused_without_it(corpus):
    config = load_config("prepare", [f"source.root={corpus}", "output=x", "stages.face.use=false"], "help")
    for name in ("crops", "motion"):
        with pytest.raises(UserError, match=rf"{name} needs the face: set stages\.{name}\.use=false too"):
            chosen_stages(config, Synthetic(corpus))
        OmegaConf.update(config, f"stages.{name}.use", False)
    assert "motion" not in chosen_stages(config, Synthetic(corpus))
