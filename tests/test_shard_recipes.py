"""The papers' recipes, composed: ablations reach model and data, and batches are the papers'."""

import pytest
from omegaconf import OmegaConf

from engine.config import load
from engine.training.settings import TrainerConfig
from talker_t2av.model import TalkerConfig

PAPER = ["task.codec=c", "task.encoders.folder=e"]


CODECS = [f"task.codecs.{name}=c" for name in ("speech", "motion", "speaker")] + ["task.tokenizer=t"]


def talker(name, *words):
    return load("train", [f"experiment={name}", "data.root=r", *CODECS, *words])


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
    config = load("train", [f"experiment={name}", "data.root=r", *words])
    trainer = TrainerConfig(**OmegaConf.to_container(config.trainer, resolve=True))
    for processes in (1, 4, 8, 32):
        shared = trainer.shared_among(processes)
        assert shared.batch_size * shared.accumulate * processes == samples and shared.batch_size <= trainer.batch_size
