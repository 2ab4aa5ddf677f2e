"""Recipes take their data from shards by one word."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from engine.config import load
from engine.errors import UserError
from hicodit.conditions import encoder_config
from hicodit.conditions.encoders import TinyLipEncoder

MADE = "data/synthetic/shards"
PAPER = ["task.codec=c", "task.encoders.folder=e"]


@pytest.mark.parametrize(
    ("words", "place", "split", "held_out"),
    [
        (["hicodit_synthetic", "data=shards", "data.root=https://host/x"], "https://host/x/train", "train", []),
        (["hicodit_synthetic", "data=voxceleb2"], "data/shards/voxceleb2/dev", "dev", ["test"]),
        (["hicodit_paper", "data=lrs3", *PAPER], "data/shards/lrs3/trainval", "trainval", ["test"]),
        (["hicodit_synthetic"], "data/synthetic/shards/hicodit_tiny/train", "train", ["seen", "unseen"]),
    ],
)  # fmt: skip
def test_hicodit(words, place, split, held_out):
    config = load("train", [f"experiment={words[0]}", *words[1:]], "")
    assert config.data.train.source == place and config.data.split == split
    assert config.task.validate_splits == held_out
    assert (config.data.train.shards.window is None) == (config.data.make is not None)


def test_the_papers_model_with_small_encoders():
    words = ["encoders@task.encoders=tiny", "task.encoders.lip_heads=32", "data=synthetic_hicodit", "task.codec=c"]
    config = load("train", ["experiment=hicodit_paper", *words], "")
    encoders = encoder_config(OmegaConf.to_container(config.task.encoders, resolve=True))
    with torch.device("meta"):
        assert TinyLipEncoder(encoders).project.out_features == config.task.model.lip_dim == 1024
    with pytest.raises(UserError, match="lip_heads=6 does not divide lip_dim=1024"):
        replace(encoders, lip_heads=6)
    assert config.data.train.source == "data/synthetic/shards/hicodit_tiny/train"


@pytest.mark.parametrize(
    ("words", "root", "tasks", "stats"),
    [
        (["talker_synthetic", "data=shards", "data.root=s3://b/x"], "s3://b/x", ["t2av", "tts"], "s3://b/x/train/index.json"),
        (["talker_synthetic_tts", "data=shards", "data.root=x"], "x", ["tts"], "x/train/index.json"),
        (["talker_synthetic", "data=emilia"], "data/shards/emilia", ["tts"], None),
        (["talker_synthetic"], f"{MADE}/talker", ["t2av", "tts"], f"{MADE}/talker/train/index.json"),
    ],
)  # fmt: skip
def test_talker(words, root, tasks, stats):
    config = load("train", [f"experiment={words[0]}", *words[1:]], "")
    assert config.data.train.root == root and config.data.train.tasks == tasks
    assert config.data.train.stats == config.task.stats == stats
