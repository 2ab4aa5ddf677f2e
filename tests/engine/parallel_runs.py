"""Train toy tasks one after the other in the processes of one torchrun: parallel_runs.py JOBS, a JSON list.

A job: {"run": folder, "changes": of CONFIG, "node": processes that count as one machine, "task": of TASKS}.
Writes RUN/weights.pt, the averages, and RUN/facts.json: what only the running processes can tell.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from toy_task import CONFIG, RaggedSet, ToyBlocks, ToyGAN, ToyMeasured, ToyRagged, ToySet

from engine.errors import exit_process
from engine.training import distributed
from engine.training.settings import TrainerConfig
from engine.training.trainer import Trainer
from tests.lia_x.test_liax_task import WEIGHTS, make_task


class Pairs(ToySet):
    """Two random pictures an item."""

    def load(self, index, generator):
        return torch.randint(256, (2, 32, 32, 3), generator=generator, dtype=torch.uint8)

    def collate(self, items):
        return {"frames": torch.stack(items)}


def lia_x():
    """A LIA-X whose finest level joins at the third step."""
    return make_task(weights=WEIGHTS | {"adversarial": 0.0}, growth={"levels": 1, "until": 2}), Pairs()


TASKS = {
    "blocks": lambda: (ToyBlocks(), ToySet()),
    "gan": lambda: (ToyGAN(), ToySet()),
    "lia_x": lia_x,
    "measured": lambda: (ToyMeasured(), ToySet()),
    "ragged": lambda: (ToyRagged(), RaggedSet()),
    "failing": lambda: (ToyMeasured(fails=1), ToySet()),
}


def run(job: dict) -> None:
    torch.manual_seed(0)
    task, data = TASKS[job.get("task", "blocks")]()
    folder = Path(job["run"])
    config = TrainerConfig(**CONFIG | job["changes"]).shared_among(distributed.world_size())
    trainer = Trainer(task, data, config, job["run"])
    plain = dist.reduce_scatter_tensor
    count = 0

    def counted(*arguments, **options):
        nonlocal count
        count += 1
        return plain(*arguments, **options)

    dist.reduce_scatter_tensor = counted
    trainer.fit()
    dist.reduce_scatter_tensor = plain
    with trainer.parallel.evaluation_copy(trainer.ema) as task:
        if distributed.is_main():
            torch.save(task.state_dict(), folder / "weights.pt")
            held = sum(p.numel() for p in map(distributed.local, trainer.task.parameters()))
            (folder / "facts.json").write_text(json.dumps({"reduced": count, "held": held}))


def worker(jobs: list[dict]) -> None:
    """Do the jobs in one process of a group, and end it."""
    distributed.init(os.environ.get("DEVICE", "cpu"))
    try:  # both ends are at once, as in train.py: threads of gloo that are left would sometimes abort a normal one
        for each in jobs:
            os.environ["LOCAL_WORLD_SIZE"] = str(each["node"])
            run(each)
        distributed.shutdown()
    except Exception:
        traceback.print_exc()
        exit_process(1)
    exit_process(0)


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
