"""Train any model: `python train.py experiment=NAME`, or `torchrun --nproc_per_node=N train.py experiment=NAME`."""

from __future__ import annotations

if __name__ == "__main__":
    from scripts import environment  # noqa: F401 -- checks the environment before other imports

import shlex
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from engine.config import CONFIGS
from engine.errors import run_cli
from engine.program import run_program, runs

HELP = """
Train a model. A recipe (experiment=NAME) sets the task, the data and the trainer's settings, which can all be changed
on the command line. The run's folder contains checkpoints/, log.jsonl, validation/ and, at the end, release/ with the
averaged weights. After a stop or a crash, the same command resumes from the last checkpoint. SIGTERM, SIGUSR1 and
Ctrl-C save a checkpoint and end the program with exit code 75.

Fine-tuning: init=FOLDER (or OWNER/NAME on the hub) starts from a release; lora.rank=N trains only low-rank updates.

Examples:
python train.py experiment=hicodit_synthetic
python train.py experiment=hicodit_synthetic trainer=gpu trainer.batch_size=64 run=runs/big_batch
torchrun --nproc_per_node=2 train.py experiment=hicodit_synthetic
python train.py experiment=talker_synthetic data.tasks=[t2av] init=assets/talker_t2av_real lora.rank=8 run=runs/new
python train.py -m experiment=hicodit_synthetic trainer.lr=3e-4,6e-4
python train.py experiment=hicodit_synthetic --help
"""


@hydra.main(config_path=str(CONFIGS), config_name="train", version_base="1.3")
@runs(output="run")
def train(config: DictConfig) -> int:
    command = shlex.join(["python", "train.py", *HydraConfig.get().overrides.task])
    from engine.training.run import run  # importing PyTorch takes seconds

    return run(config, command)


def main() -> int:
    return run_program(train, "train", HELP, sys.argv[1:])


if __name__ == "__main__":
    run_cli(main)
