"""Train any model: `python train.py experiment=NAME`, or `torchrun --nproc_per_node=N train.py experiment=NAME`."""

from __future__ import annotations

if __name__ == "__main__":
    from scripts import environment  # noqa: F401 -- before anything that may be missing

import shlex
import subprocess
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from engine.config import build, load
from engine.errors import UserError, run_cli
from engine.hub import release_folder
from engine.media.corpus import is_prepared, read_manifest
from engine.media.limits import Limits, set_limits
from engine.optional import require
from engine.seeding import check_seed
from engine.shards.source import join, read_index
from engine.training import distributed
from engine.training.parallel import build_once
from engine.training.signals import REQUEUE
from engine.training.task import Task
from engine.training.trainer import Trainer

HELP = """
Train a model. A recipe (experiment=NAME) sets the task, the data and the trainer's settings, which can all be changed
on the command line. The run's folder holds checkpoints/, log.jsonl, validation/ and, at the end, release/ with the
averaged weights. After a stop or a crash, the same command resumes from the last checkpoint. SIGTERM, SIGUSR1 and
Ctrl-C save a checkpoint and end the program with exit code 75.

Fine-tuning: init=FOLDER (or OWNER/NAME on the hub) starts from a release; lora.rank=N trains only low-rank updates.

Examples:
python train.py experiment=hicodit_synthetic
python train.py experiment=hicodit_synthetic trainer=gpu trainer.batch_size=64 run=runs/big_batch
torchrun --nproc_per_node=2 train.py experiment=hicodit_synthetic
python train.py experiment=talker_synthetic_2 init=assets/talker_t2av_tiny lora.rank=8 trainer.lr=1e-4 run=runs/adapted
python train.py experiment=hicodit_synthetic --help
"""


def main() -> int | None:
    config = load("train", sys.argv[1:], HELP)
    command = shlex.join(["python", "train.py", *sys.argv[1:]])
    if config.lora.rank and not config.task.get("init"):
        raise UserError(f"lora.rank={config.lora.rank} adapts a release: name it with init=FOLDER")
    set_limits(Limits(**config.limits))
    distributed.init(config.trainer.device)
    check_inputs(config)
    make_data(config.data)
    check_held_out(config.data)

    def make_task() -> Task:
        torch.manual_seed(config.trainer.seed)  # initial weights
        task = build(config.task)
        if config.lora.rank:
            task.adapt(**config.lora)
        return task

    trainer = Trainer(
        make_task() if config.trainer.parallel == "ddp" else build_once(make_task),
        build(config.data.train),
        OmegaConf.to_container(config.trainer, resolve=True),
        run=config.run,
        record={**OmegaConf.to_container(config, resolve=True), "command": command},
        fresh=config.fresh,
    )
    finished = trainer.fit() is not None
    if finished:
        trainer.release(Path(config.run) / "release")
    distributed.shutdown()  # not after a failure: it would wait for processes that wait for this one
    return 0 if finished else REQUEUE


def check_inputs(config: DictConfig) -> None:
    """Find the releases that the task starts from, before hours of making data for it.

    Raises:
        UserError: one is missing, or the seed cannot be used.
    """
    check_seed(config.trainer.seed)
    named = {"init": config.task.get("init"), "task.codec": config.task.get("codec")}
    named |= {f"task.codecs.{stream}": codec for stream, codec in (config.task.get("codecs") or {}).items()}
    for key, place in named.items():
        if isinstance(place, str) and not release_folder(place).exists():
            raise UserError(f"{key}={place}: there is no such file or folder")


def check_held_out(data: DictConfig) -> None:
    """
    Raises:
        UserError: a validation split is not there; without this, the first validation would find out.
    """
    root = data.get("root") or data.get("corpus")
    for split in (data.get("held_out") or ()) if root else ():
        try:
            if is_prepared(root, split) or data.get("shards"):
                read_index(join(root, split))
            else:
                read_manifest(root, split)
        except UserError as error:
            raise UserError(f"data.held_out has {split}: make that split, or set data.held_out=[] ({error})") from error


def make_data(data: DictConfig) -> None:
    """Run the commands of `data.make` in order (rank 0; the others wait). Each does only what is not done yet.

    Raises:
        UserError: a package of `data.needs` is not installed, or a script failed.
    """
    for package in data.get("needs") or ():
        require(package, package)
    for command in filter(None, (data.get("make") or {}).values()) if distributed.is_main() else ():
        script, *arguments = map(str, command)
        code = subprocess.run([sys.executable, Path(__file__).resolve().parent / script, *arguments]).returncode
        if code != 0:
            raise UserError(f"{script} {' '.join(arguments)} failed (exit {code}), so there is no data to train on")
    distributed.barrier()


if __name__ == "__main__":
    run_cli(main, distributed.exit_process)
