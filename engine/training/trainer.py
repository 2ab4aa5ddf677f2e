"""The training loop: one task, one dataset, any number of processes.

A task defines what is learned; the trainer does everything else. Data order, augmentation and all random draws of
step n are functions of (seed, n), so a resumed run equals an unbroken one, and W processes see the same data and the
same random numbers as one process with `accumulate` W times larger.
"""

from __future__ import annotations

import errno
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.files import refuse_links
from engine.seeding import seed_for
from engine.training import checkpoint, distributed
from engine.training.batches import MicroBatches, TrainingSet, load_batches
from engine.training.checkpoint import Checkpoints
from engine.training.ema import ExponentialMovingAverage
from engine.training.export import describe, export
from engine.training.guard import StepGuard
from engine.training.parallel import ParallelTask, adamw
from engine.training.signals import StopRequest
from engine.training.speed import Utilisation, memory_gib, peak_tflops, tracing
from engine.training.task import Task, TrainerConfig
from engine.training.tracking import Tracker, Window, progress_line

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Trainer:
    """Trains `task` on `dataset` in the folder `run`: checkpoints/, validation/, log.jsonl, bad_batches.jsonl.

    Args:
        task: see `Task`; it is moved to the device.
        dataset: see `engine.training.batches.TrainingSet`.
        config: the fields of `TrainerConfig`.
        run: folder of this run; an earlier run in it is continued.
        record: the whole config, kept with checkpoints and log.
        fresh: delete earlier checkpoints, unless torchrun or SLURM started this process again by itself.

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
        self.code = checkpoint.code_version()
        self.device = distributed.pick_device(self.config.device)
        self.task = task.to(self.device)
        self.parallel = ParallelTask(self.task, self.config, self.device)
        self.parameters, self.optimisers = {}, {}
        for part, module in task.parts().items():
            self.parameters[part] = {k: p for k, p in module.named_parameters() if p.requires_grad}
            self.optimisers[part] = adamw(self.parameters[part].values(), self.config)
        self.ema = ExponentialMovingAverage(task, self.config.ema_decay)
        self.buffers = [name for name, _ in task.named_buffers() if name in task.state_dict()]
        c = self.config
        self.batches = MicroBatches(dataset, c.batch_size, c.seed, c.batch_tokens, c.by_length)
        self.checkpoints = Checkpoints(self.run / "checkpoints", self.config.keep, self.config.best)
        self.guard = StepGuard(self.run, self.config.spike)
        self.use = Utilisation(peak_tflops(self.config.peak_tflops, self.device))
        self.step = self.position = 0  # steps done; batches used for them, in all processes together
        self.write_error: str | None = None  # what this process could not write; training ends at the next step

    def fit(self) -> dict[str, float] | None:
        """Train to `config.steps` and validate.

        Returns:
            The results of the last validation ({} on ranks other than 0). None: stopped by SIGTERM, SIGUSR1 or
            Ctrl-C, after a checkpoint; run again to go on.

        Raises:
            UserError: too many steps in a row were skipped, or the disk is full; the last checkpoint is complete.
        """
        c = self.config
        self._resume()
        distributed.from_main(lambda: describe(self.run, self.task))
        tracker = Tracker(self.run, self.step, c.wandb, c.tensorboard, self.record) if distributed.is_main() else None
        self._say(f"{self._count()}; {c.steps - self.step:,} of {c.steps:,} steps to go on {self._where()}")
        self.task.train()
        try:
            with StopRequest() as stop, tracing(self.run / "profile", c.profile, distributed.rank()) as trace:
                coming = self._numbers((c.steps - self.step) * c.accumulate)
                batches = load_batches(self.batches, coming, c.workers, pinned=self.device.type == "cuda")
                window, stopping = Window(), False
                while self.step < c.steps and not stopping:
                    begin = time.perf_counter()
                    batch = [_to(next(batches), self.device) for _ in range(c.accumulate)]
                    window.wait += time.perf_counter() - begin
                    with self.use.counting(sum(self.task.tokens(b) for b in batch)):
                        stopping = self._train_step(batch, window, stop)
                    if trace:
                        trace.step()
                    leaving = stopping or self.step == c.steps
                    if self.step % c.log_every == 0 or leaving:
                        self._log(window, tracker)
                        window = Window()
                    begin = time.perf_counter()
                    validating = self.step % c.validate_every == 0 and not leaving
                    if self.step % c.checkpoint_every == 0 or leaving or (validating and c.best):
                        self._save()
                    if validating:
                        self.validate(tracker)
                    window.start += time.perf_counter() - begin  # neither counts in the rates
            self._stop_on_write_error()
            results = None
            if self.step < c.steps:
                self._say(f"stopped at step {self.step:,}, saved; the same command goes on from here")
            else:
                results = self.validate(tracker)
                self._stop_on_write_error()
            return results
        finally:
            self.checkpoints.close()
            if tracker:
                tracker.close()

    def validate(self, tracker: Tracker | None = None) -> dict[str, float]:
        """`task.validate` with averaged weights on rank 0 ({} on the others, which wait)."""
        results: dict[str, float] = {}
        with self._record_write_error(), self.parallel.evaluation_copy(self.ema) as task:
            if task is not None:
                folder = self.run / "validation" / f"step-{self.step:08d}"
                torch.manual_seed(seed_for(self.config.seed, "validate"))
                folder.mkdir(parents=True, exist_ok=True)
                results = {k: float(v) for k, v in task.validate(self.step, folder).items()}
                figures = " ".join(f"{k} {v:.4g}" for k, v in results.items())
                self._say(f"step {self.step:,} | validation {figures or 'gives no figures: the task measures none'}")
                if tracker:
                    tracker.write({"step": self.step, **{f"validation/{k}": v for k, v in results.items()}})
                    tracker.media(self.step, folder)
                if not any(folder.iterdir()):
                    folder.rmdir()
                if self.config.best and self.config.best.split()[1] not in results:
                    self._say(
                        f"trainer.best={self.config.best!r}: no best is kept, as the validation gives "
                        f"{', '.join(results) or 'no figures'}"
                    )
        self._stop_on_write_error()
        self.checkpoints.note(self.step, results)
        return results

    def release(self, folder: str | Path) -> None:
        """Write a release folder from the last checkpoint (rank 0; the others wait)."""
        distributed.from_main(lambda: export(self.run, folder))
        self._say(f"released to {folder}")

    def _train_step(self, batches: list[dict[str, Any]], window: Window, stop: StopRequest) -> bool:
        """One update of every part; gives whether any process was asked to stop."""
        lr, reason, stopping = self.config.lr_at(self.step), None, False
        self._share_buffers()
        for part, optimiser in self.optimisers.items():
            losses, each = self._gradients(part, batches)
            figures = torch.stack([losses["loss"], losses["grad_norm"]]).double()
            bad, asked = (~figures.isfinite()).any(), stop.asked
            failed = bool(self.write_error or self.checkpoints.problem)
            flags = torch.stack([bad, *torch.tensor([asked, failed], device=self.device)])
            bad, stopping, failed, loss, norm = distributed.maximum(torch.cat([flags, figures.nan_to_num()]))
            if failed:
                self._stop_on_write_error()
            reason = self.guard.reason_to_skip(part, {"loss": loss, "grad_norm": norm}, finite=not bad)
            if reason:  # later parts may depend on this one: they are skipped too
                self._skip(part, reason, batches, each)
                break
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
            window.add(losses, f"{part}/" if len(self.optimisers) > 1 else "")
        self.task.zero_grad(set_to_none=True)
        window.steps += 1
        window.tokens += sum(self.task.tokens(batch) for batch in batches)
        if not reason:
            self.guard.passed()
            self.ema.update(self.step)
        self.step += 1
        self.position += self.config.accumulate * distributed.world_size()
        return bool(stopping)

    def _gradients(self, part: str, batches: list[dict[str, Any]]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Leave the clipped gradients of `part` over all micro-batches; gives the mean losses with `grad_norm`, and
        the loss of each micro-batch."""
        self.task.zero_grad(set_to_none=True)
        each = []
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        for micro, (number, batch) in enumerate(zip(self._numbers(len(batches)), batches)):
            torch.manual_seed(seed_for(self.config.seed, "step", part, number))
            with self.parallel.micro_batch(last=micro == len(batches) - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                    losses = self.parallel.losses(batch, part)
                (losses["loss"] / len(batches)).backward()
            each.append(losses["loss"].detach())
            for name, value in losses.items():
                totals[name] += value.detach().float() / len(batches)
        totals["grad_norm"] = self.parallel.clip(self.parameters[part].values(), self.config.clip or math.inf)
        return totals, each

    def _skip(self, part: str, reason: str, batches: list[dict[str, Any]], losses: list[Tensor]) -> None:
        """Count this step as skipped, record its batches, and stop after too many in a row."""
        mine = [
            {
                "rank": distributed.rank(),
                "batch": number,
                "loss": float(loss) if loss.isfinite() else str(float(loss)),
                "samples": [index for _, index in self.batches.samples(number)],
                **({"keys": list(batch["keys"])} if "keys" in batch else {}),
            }
            for number, batch, loss in zip(self._numbers(len(batches)), batches, losses)
        ]
        everyone = [entry for entries in distributed.gather(mine) for entry in entries]
        self.guard.skip()
        self._say(f"step {self.step + 1:,} skipped: {reason} ({self.guard.skipped} so far)")
        if distributed.is_main():
            with self._record_write_error():
                self.guard.write_down({"step": self.step + 1, "part": part, "reason": reason, "batches": everyone})
        if self.guard.in_a_row >= self.config.give_up_after:
            distributed.fail(
                f"training stopped at step {self.step + 1}: {reason}, {self.guard.in_a_row} steps in a row skipped; "
                f"see {self.guard.path} for their samples; fix the data or lower trainer.lr ({self.config.lr})"
            )

    @contextmanager
    def _record_write_error(self) -> Iterator[None]:
        """Keep an error of this process, such as a full disk, until all processes can stop together."""
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self.write_error = str(error)
        except UserError as error:
            self.write_error = str(error)

    def _stop_on_write_error(self) -> None:
        """Wait for the checkpoint in progress; stop all processes if one of them could not write something."""
        self.checkpoints.close()
        for problem in distributed.gather(self.write_error or self.checkpoints.problem):
            if problem:
                distributed.fail(f"training stopped after step {self.step}: {problem}")

    def _share_buffers(self) -> None:
        """Rank 0's persistent buffers count, in training as in checkpoints."""
        distributed.broadcast(self.task.get_buffer(name) for name in self.buffers)

    def _numbers(self, count: int) -> range:
        """Numbers of this process's next `count` micro-batches."""
        world = distributed.world_size()
        first = self.position + distributed.rank()
        return range(first, first + count * world, world)

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
        self._stop_on_write_error()
        self._share_buffers()
        info = {"position": self.position, **self.guard.state(), "config": self.record, "code": self.code}
        self.checkpoints.save(self.step, self._state(), info)

    def _resume(self) -> None:
        root = self.run / "checkpoints"
        distributed.from_main(lambda: refuse_links(self.run))
        if self.fresh and not distributed.restarted():
            distributed.from_main(lambda: checkpoint.remove_all(root))
            return
        folder = distributed.from_main(lambda: checkpoint.newest(root, self._say))
        if folder is None:
            return
        for part, optimiser in self.optimisers.items():
            for p in self.parameters[part].values():  # AdamW makes its state at its first step; loading needs it now
                count = torch.zeros((), device=p.device)
                optimiser.state[p] = {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state = self._state()
        info = checkpoint.load(folder, state)
        for part, optimiser in self.optimisers.items():
            for name, p in self.parameters[part].items():
                if f"optim.{part}.{name}.step" not in state:
                    del optimiser.state[p]
        self.step, self.position = info["step"], info["position"]
        self.guard.load_state(info)
        self._say(f"resumed from {folder}; init= is not read again, fresh=true starts anew")

    def _log(self, window: Window, tracker: Tracker | None) -> None:
        c, world = self.config, distributed.world_size()
        means = distributed.mean(window.means(), self.device)
        rates = window.rates(c.accumulate * self.batches.mean_size() * world, world, self.use)
        (rates["memory_gib"],) = distributed.maximum(torch.tensor([memory_gib(self.device)], device=self.device))
        if tracker:
            lr = c.lr_at(self.step - 1)
            with self._record_write_error():
                tracker.write({"step": self.step, **means, "lr": lr, **rates, "skipped": self.guard.skipped})
            self._say(progress_line(self.step, c.steps, means, lr, rates, self.use.peak))

    def _count(self) -> str:
        counts = {part: sum(p.numel() for p in ps.values()) for part, ps in self.parameters.items()}
        return "training " + ", ".join(f"{part} ({count / 1e6:.2f} M parameters)" for part, count in counts.items())

    def _where(self) -> str:
        world, c = distributed.world_size(), self.config
        return f"{world} x {self.device.type}{f' ({c.parallel})' if world > 1 else ''}, {c.precision}"

    def _say(self, line: str) -> None:
        if distributed.is_main():
            with suppress(OSError):  # its file may be on the full disk
                print(line, flush=True)


def _to(value: Any, device: torch.device) -> Any:
    """Tensors of a batch, however nested in dicts, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return {k: _to(v, device) for k, v in value.items()} if isinstance(value, dict) else value
