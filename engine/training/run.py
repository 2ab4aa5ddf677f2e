"""A run of `train.py`: what is wrong with its settings, files and devices is found before data are made."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from omegaconf import DictConfig

from engine.config import build, plain
from engine.device import pick_device
from engine.errors import UserError
from engine.files import require_space, writable
from engine.hub import release_folder
from engine.media.limits import Limits, set_limits
from engine.optional import require
from engine.settings import make
from engine.shards.recordings import is_prepared, read_manifest
from engine.shards.source import join, read_index
from engine.training import distributed
from engine.training.parallel import build_once
from engine.training.settings import TrainerConfig
from engine.training.signals import REQUEUE
from engine.training.task import Task
from engine.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


def run(config: DictConfig, command: str) -> int:
    """Train as configs/train.yaml and a recipe say; return the exit code, `REQUEUE` if the run was told to stop.

    Args:
        command: the command line, for the record.
    """
    set_limits(Limits(**config.limits))
    trainer = make(TrainerConfig, plain(config.trainer)).shared_among(int(os.environ.get("WORLD_SIZE", 1)))
    check_inputs(config)
    distributed.init(trainer.device)
    make_data(config.data)
    check_held_out(config.data)

    def make_task() -> Task:
        torch.manual_seed(trainer.seed)  # initial weights
        task = build(config.task)
        if config.lora.rank:
            task.adapt(**config.lora)
        return task

    loop = Trainer(
        make_task() if trainer.parallel == "ddp" else build_once(make_task),
        build(config.data.train),
        plain(config.trainer),
        run=config.run,
        record={**plain(config), "command": command},
        fresh=config.fresh,
    )
    finished = loop.fit() is not None
    if finished:
        loop.release(Path(config.run) / "release")
    distributed.shutdown()  # not after a failure: it would wait for processes that wait for this one
    return 0 if finished else REQUEUE


def check_inputs(config: DictConfig) -> None:
    """Find releases, folders, packages and the device that the run needs, before hours of making data for it.

    Raises:
        UserError: one is missing or cannot be used.
    """
    task, data, trainer = config.task, config.data, config.trainer
    if config.lora.rank and not task.get("init"):
        raise UserError(f"lora.rank={config.lora.rank} adapts a release: name it with init=FOLDER")
    named = {"init": task.get("init"), "task.codec": task.get("codec")}
    named |= {f"task.codecs.{stream}": codec for stream, codec in (task.get("codecs") or {}).items()}
    for key, place in named.items():
        if isinstance(place, str) and not release_folder(place).exists():
            raise UserError(f"{key}={place}: there is no such file or folder")
    made = [key for key in ("corpus", "root") if data.get("make") and data.get(key) and "://" not in data[key]]
    with ExitStack() as stack:
        stack.enter_context(writable(config.run, "run"))
        for key in made:
            stack.enter_context(writable(data[key], f"data.{key}"))
        require_space(config.run, "run")
    for package in data.get("needs") or ():
        require(package, package)
    if config.lora.rank:
        require("peft", "PEFT", "finetune")
    if trainer.tensorboard:
        require("torch.utils.tensorboard", "TensorBoard", "tensorboard")
    pick_device(trainer.device)


def check_held_out(data: DictConfig) -> None:
    """Find the validation splits, which the first validation needs.

    Raises:
        UserError: one is missing.
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
        UserError: a script failed.
    """
    for command in filter(None, (data.get("make") or {}).values()) if distributed.is_main() else ():
        script, *arguments = map(str, command)
        code = subprocess.run([sys.executable, ROOT / script, *arguments]).returncode
        if code != 0:
            raise UserError(f"{script} {' '.join(arguments)} failed (exit {code}), so there is no data to train on")
    distributed.barrier()
