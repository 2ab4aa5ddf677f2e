"""A run of `train.py`. Invalid settings, missing files and devices are detected before data are generated."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from engine.config import plain
from engine.errors import UserError, require
from engine.files import CHECKOUT, refuse_links, require_space
from engine.hub import release_folder
from engine.instantiate import build, target
from engine.metrics.registry import metrics_of
from engine.release import check_replaceable
from engine.settings import Limits, make, require_range, set_limits
from engine.shards.reader import ShardSplit
from engine.shards.recordings import is_prepared, read_manifest, spread
from engine.shards.source import join, read_index
from engine.training import checkpoint, distributed
from engine.training.batches import require_lengths
from engine.training.parallel import build_once, require_blocks
from engine.training.settings import TrainerConfig
from engine.training.signals import REQUEUE
from engine.training.task import Task
from engine.training.tracking import check_trackers
from engine.training.trainer import Trainer


def run(config: DictConfig, command: str) -> int:
    """Train as specified by the config and return the exit code, which is `REQUEUE` if the run was stopped by a signal.

    Args:
        command: the command line, which is recorded.
    """
    set_limits(Limits(**config.limits))
    trainer = make(TrainerConfig, plain(config.trainer)).shared_among(int(os.environ.get("WORLD_SIZE", 1)))
    check_inputs(config)
    distributed.init(trainer.device, config.run)

    def make_task() -> Task:
        torch.manual_seed(trainer.seed)  # initial weights
        task = build(config.task)
        if config.lora.rank:
            task.adapt(**config.lora)
        return task

    if made_folders(config.data):
        distributed.from_main(lambda: try_to_build(config, trainer, make_task))
    distributed.from_main(lambda: make_data(config.data))
    check_validation(config)
    loop = Trainer(
        make_task() if trainer.parallel == "ddp" else build_once(make_task),
        build(config.data.train),
        trainer,
        run=config.run,
        record={**plain(config), "command": command},
        fresh=config.fresh,
    )
    finished = loop.fit() is not None
    if finished:
        loop.release(Path(config.run) / "release")
    distributed.shutdown()  # not after a failure, where it could deadlock with waiting processes
    return 0 if finished else REQUEUE


def check_inputs(config: DictConfig) -> None:
    """Check releases, folders and packages that the run needs, before its data are generated."""
    task = config.task
    data = config.data
    trainer = config.trainer
    if config.lora.rank and not task.get("init"):
        raise UserError(f"lora.rank={config.lora.rank} adapts a release: set init=FOLDER")
    named = {"init": task.get("init"), "task.codec": task.get("codec")}
    named |= {f"task.codecs.{stream}": codec for stream, codec in (task.get("codecs") or {}).items()}
    for key, place in named.items():
        if isinstance(place, str) and not release_folder(place, key).exists():
            raise UserError(f"{key}={place}: no such file or folder")
    validation = task.get("validation") or {}
    splits = data.get("splits")
    for key, count in (("validate_clips", task.get("validate_clips")), ("validation.clips", validation.get("clips"))):
        require_range(f"task.{key}", 1 if count is None else count, 1, 10**6)
    metrics_of(validation.get("metrics") or ())
    for split in [data.get("split"), *(data.get("held_out") or ())] if splits else ():
        if split not in (None, *splits):
            raise UserError(f"data.split or data.held_out: no split is called {split}; choose from {', '.join(splits)}")
    for key, folder in {"run": config.run, **made_folders(data)}.items():
        require_space(folder, key)
    refuse_links(Path(config.run))
    check_replaceable(Path(config.run) / "release")
    for folder in (Path(config.run) / "checkpoints", Path(config.run) / "validation"):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file instead of a folder: rename it, or set another run=FOLDER")
    for package in data.get("needs") or ():
        require(package, package)
    if config.lora.rank:
        require("peft", "PEFT", "finetune")
    check_trackers(trainer.wandb, trainer.tensorboard)


def made_folders(data: DictConfig) -> dict[str, str]:
    """Return the data folders that `data.make` generates, by setting; {} for data that the user provides."""
    folders = {f"data.{key}": data.get(key) for key in ("corpus", "root") if data.get("make")}
    return {key: folder for key, folder in folders.items() if folder and "://" not in folder}


def try_to_build(config: DictConfig, trainer: TrainerConfig, make_task: Callable[[], Task]) -> None:
    """Build the task before its data are generated, to detect invalid settings and damaged releases.

    Errors that mention one of the data folders are ignored until these are generated.
    """
    folders = made_folders(config.data).values()

    def check_task() -> None:
        task = make_task()
        require_blocks(task, trainer.compile, trainer.checkpointing)
        if not config.fresh:
            checkpoint.require_model(Path(config.run) / "checkpoints", task)

    def check_data() -> None:
        if trainer.by_length:
            require_lengths(target(config.data.train._target_))
        build(config.data.train)

    for check in (lambda: find_grammar(config), check_task, check_data):
        try:
            check()
        except UserError as error:
            if not any(folder in str(error) for folder in folders):
                raise


def check_validation(config: DictConfig) -> None:
    """Check the requirements of the first validation: held-out splits, recordings and a grammar."""
    data = config.data
    root = data.get("root") or data.get("corpus")
    corpus = config.task.get("validate_corpus")
    for split in (data.get("held_out") or ()) if root else ():
        try:
            if is_prepared(root, split) or data.get("shards"):
                read_index(join(root, split))
            else:
                read_manifest(root, split)
        except UserError as error:
            raise UserError(f"data.held_out contains {split}: prepare it, or set data.held_out=[] ({error})") from error
        if corpus:
            require_recordings(join(root, split), Path(corpus), config.task.validate_clips)
    find_grammar(config)


def require_recordings(shards: str, corpus: Path, clips: int) -> None:
    """Raise UserError if `corpus` does not contain the recordings of `clips` evenly spaced samples of `shards`."""
    split = ShardSplit(shards)
    for index in spread(len(split), clips):
        info, _ = split.read(index, ())
        if not (corpus / info["source"]).is_file():
            raise UserError(
                f"task.validate_corpus={corpus} has no {info['source']} (in {shards}): set data.corpus to the folder "
                "from which the shards were prepared, or to null"
            )


def find_grammar(config: DictConfig) -> None:
    """Raise UserError if the grammar does not exist, which would otherwise fail in the first validation."""
    for key in ("task.grammar", "task.validation.grammar"):
        grammar = OmegaConf.select(config, key)
        if grammar and not Path(grammar).exists():
            raise UserError(f"{key}={grammar}: no such file or folder")


def make_data(data: DictConfig) -> None:
    """Run the commands of `data.make` in order. Each of them skips finished work."""
    for command in filter(None, (data.get("make") or {}).values()):
        script = str(command[0])
        arguments = [str(word) for word in command[1:]]
        code = subprocess.run([sys.executable, CHECKOUT / script, *arguments]).returncode
        if code == 2:  # a user error, which the command has reported
            raise SystemExit(2)
        if code != 0:
            call = f"{script} {' '.join(arguments)}"
            raise UserError(f"training data cannot be prepared: {call} failed with exit code {code}; see its messages")
