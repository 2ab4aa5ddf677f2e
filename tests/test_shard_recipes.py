"""Recipes take their data from shards by one word."""

import pytest
import torch
from omegaconf import OmegaConf

from engine.config import load
from engine.training.settings import TrainerConfig
from hicodit.conditions import encoder_config
from hicodit.conditions.encoders import TinyLipEncoder
from hicodit.model import ModelConfig
from hicodit.system import HiCoDiTSystem
from rvq_codec import RVQCodecConfig
from talker_t2av.model import TalkerConfig

MADE = "data/synthetic/shards"
PAPER = ["task.codec=c", "task.encoders.folder=e"]


@pytest.mark.parametrize(
    ("words", "place", "split", "held_out"),
    [
        (["hicodit_synthetic", "data=shards", "data.root=https://host/x"], "https://host/x/train", "train", []),
        (["hicodit_synthetic", "data=voxceleb2"], "data/shards/voxceleb2/dev", "dev", ["val"]),
        (["hicodit_paper", "data=lrs3", *PAPER], "data/shards/lrs3/trainval", "trainval", ["val"]),
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
    assert config.data.train.source == "data/synthetic/shards/hicodit_tiny/train"


@pytest.mark.parametrize(
    ("name", "weights", "root"), [("hicodit_grid", 28.5e6, "grid"), ("hicodit_lrs2", 19.8e6, "lrs2")]
)
def test_recipes_for_one_card(name, weights, root):
    config = load("train", [f"experiment={name}", *PAPER[1:] * (name == "hicodit_lrs2")], "")
    encoders = OmegaConf.to_container(config.task.encoders, resolve=True)
    model = ModelConfig(**OmegaConf.to_container(config.task.model, resolve=True))
    with torch.device("meta"):
        system = HiCoDiTSystem(model, encoder_config(encoders))
        tokenizer = RVQCodecConfig(**load("train", ["experiment=rvq_grid"], "").task.codec)
    assert sum(p.numel() for p in system.parameters()) == pytest.approx(weights, rel=0.02)
    assert (tokenizer.levels, tokenizer.codebook_size) == (model.levels, model.codes)
    assert config.data.train.source == f"data/shards/{root}/train" and config.trainer.device == "cuda"
    crops = load("prepare", ["source=grid", "source.root=r", "features=grid", "output=o"], "").stages.crops.encoders
    if encoders["kind"] == "tiny":
        assert config.data.train.phonemes == encoders["phonemes"] == 52
        assert (crops.mouth_size, crops.face_size) == (encoders["mouth_size"], encoders["face_size"])


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


CODECS = [f"task.codecs.{name}=c" for name in ("speech", "motion", "speaker")] + ["task.tokenizer=t"]


def talker(name, *words):
    return load("train", [f"experiment={name}", "data=talker_t2av_data", *CODECS, *words], "")


@pytest.mark.parametrize(
    "words", [["task.model.delay=1"], ["task.model.delay=3"], ["task.model.order=av"], ["task.model.order=va"]], ids=str
)
def test_ablations_of_the_talker_reach_model_and_data(words):
    config = talker("talker_paper", "task.warm_start.qwen=q", *words)
    model = TalkerConfig(**OmegaConf.to_container(config.task.model, resolve=True))
    assert (config.data.train.delay, config.data.train.order) == (model.delay, model.order) != (0, "add")


BATCHES = {
    "hicodit_paper": (32, PAPER),
    "talker_paper": (128, [*CODECS, "task.warm_start.qwen=q"]),
    "talker_released": (64, [*CODECS, "task.warm_start.tts=w"]),
    "rvq_paper": (64, []),
    "lia_x_paper": (32, ["task.vgg=v"]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_papers_batches_hold_on_any_number_of_gpus(name):
    samples, words = BATCHES[name]
    config = load("train", [f"experiment={name}", "data=shards", "data.root=r", *words], "")
    trainer = TrainerConfig(**OmegaConf.to_container(config.trainer, resolve=True))
    for processes in (1, 4, 8, 32):
        shared = trainer.shared_among(processes)
        assert shared.batch_size * shared.accumulate * processes == samples and shared.batch_size <= trainer.batch_size
