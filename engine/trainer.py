"""The training loop: one task, one dataset, any number of processes.

A task says what is learned; the trainer owns everything else. Data order, augmentation and all random draws of step n
are functions of (seed, n), so a resumed run equals an unbroken one, and W processes see the same data and the same
random numbers as one process with `accumulate` W times larger.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine import checkpoint, distributed
from engine.ema import ExponentialMovingAverage
from engine.errors import UserError
from engine.export import describe, export
from engine.seeding import MicroBatches, TrainingSet, seed_for
from engine.task import Task, TrainerConfig
from engine.tracking import Tracker, Window, progress_line

GIVE_UP_AFTER = 10  # steps in a row without a finite loss


class Trainer:
    """Trains `task` on `dataset` in the folder `run`: checkpoints/, validation/, log.jsonl.

    Args:
        task: see `Task`; it is moved to the device.
        dataset: see `engine.seeding.TrainingSet`.
        config: the fields of `TrainerConfig`.
        run: folder of this run; an earlier run in it is continued.
        record: the whole config, kept with checkpoints and log.
        fresh: ignore earlier checkpoints.

    Raises:
        UserError: a setting is out of range, or the folder holds a run of another model.
    """

    def __init__(
        self,
        task: Task,
        dataset: TrainingSet,
        config: Mapping[str, Any],
        run: str | Path,
        record: dict[str, Any] | None = None,
        fresh: bool = False,
    ):
        try:
            self.config = TrainerConfig(**{str(k): v for k, v in config.items()})
        except TypeError as error:
            raise UserError(f"trainer config: {error}".replace("TrainerConfig.__init__()", "it")) from error
        if len(dataset) == 0:
            raise UserError("the training set is empty")
        self.run, self.record, self.fresh = Path(run), record or {}, fresh
        self.device = distributed.pick_device(self.config.device)
        self.task, self.dataset = task.to(self.device), dataset
        self.parameters, self.optimisers = {}, {}
        for part, module in task.parts().items():
            self.parameters[part] = {k: p for k, p in module.named_parameters() if p.requires_grad}
            # Gains and biases are not decayed.
            groups = [
                [p for p in self.parameters[part].values() if (p.ndim >= 2) == matrix] for matrix in (True, False)
            ]
            self.optimisers[part] = torch.optim.AdamW(
                [{"params": g, "weight_decay": d} for g, d in zip(groups, (self.config.weight_decay, 0.0)) if g],
                lr=self.config.lr,
                betas=tuple(self.config.betas),
                fused=self.device.type == "cuda",
            )
            if self.config.compile:
                module.compile()
        self.ema = ExponentialMovingAverage(task, self.config.ema_decay)
        self.losses: nn.Module = _Losses(task)
        if distributed.world_size() > 1:
            # No device_ids: with them DDP copies the batch, and what one part stores in it would be lost to the next.
            # Buffers are sent by `_share_buffers`: DDP would overwrite those that a stored result's backward needs.
            self.losses = DistributedDataParallel(
                self.losses,
                find_unused_parameters=len(self.optimisers) > 1,
                broadcast_buffers=False,
            )
        self.buffers = [name for name, _ in task.named_buffers() if name in task.state_dict()]
        self.step = self.skipped = self.skipped_in_a_row = 0

    def fit(self) -> dict[str, float] | None:
        """Train to `config.steps` and validate.

        Returns:
            The results of the last validation ({} on ranks other than 0). None: stopped by SIGTERM or Ctrl-C, after
            a checkpoint; run again to go on.
        """
        c = self.config
        self._resume()
        if distributed.is_main():
            describe(self.run, self.task)
        tracker = Tracker(self.run, self.step, c.wandb, self.record) if distributed.is_main() else None
        self._say(f"{self._count()}; {c.steps - self.step:,} of {c.steps:,} steps to go on {self._where()}")
        self.task.train()
        with _Stop() as stop:
            batches, window, stopping = self._batches(), Window(), False
            while self.step < c.steps and not stopping:
                begin = time.perf_counter()
                batch = [_to(next(batches), self.device) for _ in range(c.accumulate)]
                window.wait += time.perf_counter() - begin
                stopping = self._train_step(batch, window, stop)
                self.step += 1
                leaving = stopping or self.step == c.steps
                if self.step % c.log_every == 0 or leaving:
                    self._log(window, tracker)
                    window = Window()
                begin = time.perf_counter()
                if self.step % c.checkpoint_every == 0 or leaving:
                    self._save()
                if self.step % c.validate_every == 0 and not leaving:
                    self.validate(tracker)
                window.start += time.perf_counter() - begin  # neither counts in the rates
        results = None
        if self.step < c.steps:
            self._say(f"stopped at step {self.step:,}, saved; the same command goes on from here")
        else:
            results = self.validate(tracker)
        if tracker:
            tracker.close()
        return results

    def validate(self, tracker: Tracker | None = None) -> dict[str, float]:
        """`task.validate` with averaged weights on rank 0 ({} on the others, which wait)."""
        results: dict[str, float] = {}
        if distributed.is_main():
            folder = self.run / "validation" / f"step-{self.step:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(seed_for(self.config.seed, "validate"))
            with self._released_weights():
                results = {k: float(v) for k, v in self.task.validate(self.step, folder).items()}
            self._say(f"step {self.step:,} | validation " + " ".join(f"{k} {v:.4g}" for k, v in results.items()))
            if tracker:
                tracker.write({"step": self.step, **{f"validation/{k}": v for k, v in results.items()}})
            if not any(folder.iterdir()):
                folder.rmdir()
        distributed.barrier()
        return results

    def release(self, folder: str | Path) -> None:
        """Write a release folder from the last checkpoint (rank 0; the others wait)."""
        if distributed.is_main():
            export(self.run, folder)
            self._say(f"released to {folder}")
        distributed.barrier()

    def _train_step(self, batches: list[dict[str, Any]], window: Window, stop: _Stop) -> bool:
        """One update of every part; gives whether any process was asked to stop."""
        lr, bad, stopping = self.config.lr_at(self.step), False, False
        self._share_buffers()
        for part, optimiser in self.optimisers.items():
            losses = self._gradients(part, batches)
            healthy = losses["loss"].isfinite() & losses["grad_norm"].isfinite()
            bad, stopping = distributed.any_true(torch.stack([~healthy, torch.tensor(stop.asked, device=self.device)]))
            if bad:  # later parts may depend on this one: the rest of the step is left out
                break
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
            window.add(losses, f"{part}/" if len(self.optimisers) > 1 else "")
        self.task.zero_grad(set_to_none=True)
        window.steps += 1
        window.tokens += sum(self.task.tokens(batch) for batch in batches)
        if bad:
            self._count_skipped()
        else:
            self.skipped_in_a_row = 0
            self.ema.update(self.step)
        return stopping

    def _gradients(self, part: str, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Leave the clipped gradients of `part` over all micro-batches; gives the mean losses and `grad_norm`."""
        self.task.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        for micro, batch in enumerate(batches):
            number = self._first_batch() + micro * distributed.world_size()
            torch.manual_seed(seed_for(self.config.seed, "step", part, number))
            waits = micro < len(batches) - 1 and isinstance(self.losses, DistributedDataParallel)
            with self.losses.no_sync() if waits else nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                    losses = self.losses(batch, part)
                (losses["loss"] / len(batches)).backward()
            for name, value in losses.items():
                totals[name] += value.detach().float() / len(batches)
        clip = self.config.clip or math.inf
        totals["grad_norm"] = nn.utils.clip_grad_norm_(self.parameters[part].values(), clip)
        return totals

    def _count_skipped(self) -> None:
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self._say(f"step {self.step + 1:,} skipped: loss or gradient is not finite ({self.skipped} so far)")
        if self.skipped_in_a_row >= GIVE_UP_AFTER:
            raise UserError(
                f"training stopped at step {self.step + 1}: loss not finite {GIVE_UP_AFTER} times in a row; "
                f"lower trainer.lr ({self.config.lr}) or go back to an earlier checkpoint"
            )

    def _share_buffers(self) -> None:
        """Rank 0's persistent buffers count, in training as in checkpoints."""
        distributed.broadcast(self.task.get_buffer(name) for name in self.buffers)

    def _first_batch(self) -> int:
        """Number of this process's first micro-batch of the present step; the next ones lie `world_size` apart."""
        return self.step * self.config.accumulate * distributed.world_size() + distributed.rank()

    def _batches(self) -> Iterator[dict[str, Any]]:
        world = distributed.world_size()
        numbers = range(self._first_batch(), self.config.steps * self.config.accumulate * world, world)
        workers = self.config.workers
        return iter(
            torch.utils.data.DataLoader(
                MicroBatches(self.dataset, self.config.batch_size, self.config.seed),
                batch_size=None,
                sampler=numbers,
                num_workers=workers,
                prefetch_factor=4 if workers else None,
                pin_memory=self.device.type == "cuda",
            )
        )

    @contextmanager
    def _released_weights(self) -> Iterator[None]:
        self.task.eval()
        with self.ema.swapped_in(), torch.no_grad():
            yield
        self.task.train()

    def _state(self) -> dict[str, Tensor]:
        """Everything that training changes, as a flat dict of tensors (references, not copies)."""
        state = {f"model.{k}": v for k, v in self.task.state_dict().items()}
        state |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for part, optimiser in self.optimisers.items():
            for name, parameter in self.parameters[part].items():
                for key, value in optimiser.state[parameter].items():
                    state[f"optim.{part}.{name}.{key}"] = value
        return state

    def _save(self) -> None:
        self._share_buffers()
        info = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row, "config": self.record}
        checkpoint.save(self.run / "checkpoints", self.step, self._state(), info, self.config.keep)

    def _resume(self) -> None:
        root = self.run / "checkpoints"
        if self.fresh:
            if distributed.is_main():
                checkpoint.remove_all(root)
            distributed.barrier()
            return
        folder = distributed.broadcast_object(checkpoint.newest(root, self._say) if distributed.is_main() else None)
        if folder is None:
            return
        for part, optimiser in self.optimisers.items():
            for p in self.parameters[part].values():  # AdamW makes its state at its first step; loading needs it now
                count = torch.zeros((), device=p.device if self.device.type == "cuda" else "cpu")
                optimiser.state[p] = {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state = self._state()
        info = checkpoint.load(folder, state)
        for part, optimiser in self.optimisers.items():
            for name, p in self.parameters[part].items():
                if f"optim.{part}.{name}.step" not in state:
                    del optimiser.state[p]
        self.step, self.skipped, self.skipped_in_a_row = info["step"], info["skipped"], info["skipped_in_a_row"]
        self._say(f"resumed from {folder}")

    def _log(self, window: Window, tracker: Tracker | None) -> None:
        c, world = self.config, distributed.world_size()
        means = distributed.mean(window.means(), self.device)
        rates = window.rates(c.accumulate * c.batch_size * world, world)
        if tracker:
            lr = c.lr_at(self.step - 1)
            tracker.write({"step": self.step, **means, "lr": lr, **rates, "skipped": self.skipped})
            self._say(progress_line(self.step, c.steps, means, lr, rates))

    def _count(self) -> str:
        counts = {part: sum(p.numel() for p in ps.values()) for part, ps in self.parameters.items()}
        return "training " + ", ".join(f"{part} ({count / 1e6:.2f} M parameters)" for part, count in counts.items())

    def _where(self) -> str:
        return f"{distributed.world_size()} x {self.device.type}, {self.config.precision}"

    def _say(self, line: str) -> None:
        if distributed.is_main():
            print(line, flush=True)


class _Losses(nn.Module):
    """The task as DDP needs it: of what it returns, only `loss` may be attached to the graph."""

    def __init__(self, task: Task):
        super().__init__()
        self.task = task

    def forward(self, batch: dict[str, Any], part: str) -> dict[str, Tensor]:
        losses = self.task(batch, part)
        return {k: v if k == "loss" else v.detach() for k, v in losses.items()}


class _Stop:
    """Turns the first SIGTERM or Ctrl-C into `asked`; a second one acts as usual."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        self.asked = True
        signal.signal(number, self._previous[number])


def _to(value: Any, device: torch.device) -> Any:
    """Tensors of a batch, however nested in dicts, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return {k: _to(v, device) for k, v in value.items()} if isinstance(value, dict) else value
