"""The training loop: one task, one dataset, any number of processes.

A task defines what is learned; the trainer does everything else. Data order, augmentation and all random draws of
step n are functions of (seed, n), so a resumed run equals an unbroken one, and W processes see the same data and the
same random numbers as one process with `accumulate` W times larger.
"""

from __future__ import annotations

import errno
import gc
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.device import pick_device
from engine.errors import UserError
from engine.evaluation.validation import ByClip, Share, figures_of
from engine.files import refuse_links
from engine.seeding import seed_for
from engine.settings import make
from engine.training import checkpoint, distributed
from engine.training.batches import MicroBatches, TrainingSet, load_batches
from engine.training.checkpoint import Checkpoints
from engine.training.ema import ExponentialMovingAverage
from engine.training.export import describe, export
from engine.training.parallel import ParallelTask, adamw, begin_state, clipping_groups, update
from engine.training.settings import TrainerConfig
from engine.training.signals import stop_requests
from engine.training.speed import Utilisation, memory_gib, peak_tflops, steady, tracing
from engine.training.task import Task
from engine.training.tracking import Tracker, Window, first_line, progress_line, validation_line

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_FINITE = "loss or gradient is not finite"  # why a step is skipped


class Trainer:
    """Trains `task` on `dataset` in the folder `run`: checkpoints/, validation/, log.jsonl, bad_batches.jsonl.

    Args:
        task: see `Task`; it is moved to the device.
        dataset: see `engine.training.batches.TrainingSet`.
        config: the fields of `TrainerConfig`.
        run: folder of this run; an earlier run in it is continued.
        record: the whole config, kept with checkpoints and log.
        fresh: delete earlier checkpoints, unless torchrun or SLURM started this process again by itself.
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
        self.config = c = make(TrainerConfig, config).shared_among(distributed.world_size())
        if len(dataset) == 0:
            raise UserError("the training set is empty")
        self.run, self.record, self.fresh = Path(run), record or {}, fresh
        self.code = checkpoint.code_version()
        self.device = pick_device(c.device)
        self.parallel = ParallelTask(task, c, self.device)
        self.task = task
        self.parameters, self.optimisers, self.clipped = {}, {}, {}
        for part, module in task.parts().items():
            self.parameters[part] = {k: p for k, p in module.named_parameters() if p.requires_grad}
            self.optimisers[part] = adamw(self.parameters[part].values(), c)
            self.clipped[part] = clipping_groups(self.parameters[part].values(), task.clipped_apart())
        self.ema = ExponentialMovingAverage(task, c.ema_decay)
        self.buffers = [name for name, _ in task.named_buffers() if name in task.state_dict()]
        self.batches = MicroBatches(dataset, c.batch_size, c.seed, c.by_length)
        self.checkpoints = Checkpoints(self.run / "checkpoints", c.keep, c.best)
        self.skipped = self.skipped_in_a_row = 0
        # Of the steps since these were counted: number, numbers of its micro-batches and keys of their samples; for
        # each part whether it is finite in all processes, and the losses of the micro-batches (parts, 1 + n).
        self.steps_done: list[tuple[int, range, list[Any], Tensor]] = []
        self.agreement = distributed.Agreement()
        self.use = Utilisation(peak_tflops(c.peak_tflops, self.device))
        self.step = self.position = 0  # steps done; batches used for them, in all processes together
        self.validated = 0  # the last step that was validated
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
        start, window, stopping = (self.step, self.validated == self.step), Window(), False
        tracker = Tracker(self.run, start, c.wandb, c.tensorboard, self.record) if distributed.is_main() else None
        self._say(first_line(self.parameters, self.step, c, self.device.type, distributed.world_size()))
        self.task.train()
        try:
            with (
                stop_requests() as stops,
                tracing(self.run / "profile", c.profile, distributed.rank()) as trace,
                steady(self.device, c.precision, self.batches.fixed_shapes) as settings,
            ):
                self._say(settings)
                numbers = self._numbers((c.steps - self.step) * c.accumulate)
                batches = load_batches(self.batches, numbers, c.workers, self.device, self.task.on_host)
                while self.step < c.steps and not stopping:
                    # Before the next step, not after the last: so a run that stopped in between validates when resumed.
                    if self.step % c.validate_every == 0 and self.step > self.validated:
                        with window.paused():
                            self.validate(tracker)
                    self.use.count(self._train_step, batches, window)
                    if trace:
                        trace.step()
                    failing = bool(self.write_error or self.checkpoints.problem)
                    stopping, failed = self.agreement.reach(bool(stops), failing)  # in any process
                    if failed:
                        self._stop_on_write_error()
                    if window.steps == 1:
                        distributed.shorten_timeouts()  # what starts slowly has started
                    last = stopping or self.step == c.steps
                    if self.step % c.log_every == 0 or last:
                        self._log(window, tracker)
                        window = Window()
                    may_be_best = c.best and self.step % c.validate_every == 0  # it is validated next
                    if self.step % c.checkpoint_every == 0 or last or may_be_best:
                        with window.paused():
                            self._save()
            self._stop_on_write_error()
            if stopping and self.step < c.steps:
                self._say(f"stopped at step {self.step:,}, saved; the same command goes on from here")
                return None
            return self.validate(tracker)
        finally:
            self.checkpoints.wait(failing=True)  # nothing is in work unless this process fails
            if tracker:
                tracker.close()

    def validate(self, tracker: Tracker | None = None) -> dict[str, float]:
        """Validate the averaged weights, each process its share of the clips; return the figures on rank 0, else {}.

        If one process fails, all stop: the others would wait for it.
        """
        share = Share(distributed.rank(), distributed.world_size())
        folder = self.run / "validation" / f"step-{self.step:08d}"
        figures: dict[str, float | ByClip] = {}
        results: dict[str, float] = {}
        self._share_buffers()
        with self.parallel.evaluation_copy(self.ema) as task:
            torch.manual_seed(seed_for(self.config.seed, "validate"))
            try:
                with self._record_write_error():
                    folder.mkdir(parents=True, exist_ok=True)
                    figures = task.measure(folder, share)
            except Exception as error:
                self.write_error = f"process {share.rank} failed in validation: {error!r}"
                with suppress(UserError, SystemExit):  # the others end so; this process shows where it failed
                    self._stop_on_write_error()
                raise
        self._stop_on_write_error()
        shares = distributed.gather(figures)
        if distributed.is_main():
            with self._record_write_error():
                results = figures_of(shares)
                self._say(validation_line(self.step, results, self.config.best))
                if tracker:
                    tracker.write({"step": self.step, **{f"validation/{k}": v for k, v in results.items()}})
                    tracker.media(self.step, folder)
                if not any(folder.iterdir()):
                    folder.rmdir()
                self.checkpoints.note(self.step, results)
        self._stop_on_write_error()
        self.validated = self.step
        return results

    def release(self, folder: str | Path) -> None:
        """Write a release folder from the last checkpoint (rank 0; the others wait)."""
        distributed.from_main(lambda: export(self.run, folder))
        self._say(f"released to {folder}")

    def _train_step(self, batches: Iterator[dict[str, Any]], window: Window) -> int:
        """Update every part from the next batches; return their tokens. Nothing here synchronises with the device."""
        c, first, several = self.config, next(iter(self.optimisers)), len(self.optimisers) > 1
        numbers, stored, keys, checked, tokens = self._numbers(c.accumulate), [], [], [], 0
        apply_step = torch.ones((), dtype=torch.bool, device=self.device)
        self._share_buffers()
        self.task.begin_step(self.step)
        for part, optimiser in self.optimisers.items():
            self.task.zero_grad(set_to_none=True)
            means, losses = defaultdict(lambda: torch.zeros((), device=self.device)), []
            for micro, number in enumerate(numbers):
                if part != first:
                    batch = stored[micro]
                else:
                    batch = window.next(batches)
                    tokens += self.task.tokens(batch)
                    keys.append(batch.get("keys"))
                    stored += [batch] if several else []
                torch.manual_seed(seed_for(c.seed, "step", first, number))
                # What a part stores in a batch for the next part is kept only if a step has one batch.
                batch = batch if c.accumulate == 1 else dict(batch)
                losses.append(self._backward(batch, part, means, last=micro + 1 == c.accumulate))
            norms = [self.parallel.clip(group, c.clip or math.inf) for group in self.clipped[part]]  # before clipping
            means["grad_norm"] = torch.stack([norm.to(self.device) for norm in norms]).norm()
            finite = means["loss"].isfinite() & means["grad_norm"].isfinite()
            finite = distributed.maximum_((~finite).int()) == 0  # in all processes
            checked.append(torch.stack([finite.double(), *losses]))
            apply_step = apply_step & finite  # later parts may depend on this one: they are skipped too
            for group in optimiser.param_groups:
                group["lr"] = c.lr_at(self.step)
            update(optimiser, apply_step)
            window.add(means, apply_step, f"{part}/" if several else "")
        self.task.zero_grad(set_to_none=True)
        self.ema.update(self.step)
        self.step, self.position = self.step + 1, self.position + c.accumulate * distributed.world_size()
        self.steps_done.append((self.step, numbers, keys, torch.stack(checked)))
        window.steps, window.tokens = window.steps + 1, window.tokens + tokens
        return tokens

    def _backward(self, batch: dict[str, Any], part: str, means: dict[str, Tensor], last: bool) -> Tensor:
        """Add a batch's gradients, and its losses to the step's `means`; return its loss."""
        with self.parallel.micro_batch(last):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                losses = self.parallel.losses(batch, part)
            (losses["loss"] / self.config.accumulate).backward()
        for name, value in losses.items():
            means[name] += value.detach().float() / self.config.accumulate
        return losses["loss"].detach().double()

    def _report_skipped(self) -> None:
        """Count and record the steps that were skipped since the last call, and stop after too many in a row."""
        if not self.steps_done:
            return
        checked = torch.stack([each for *_, each in self.steps_done]).tolist()  # one copy from the device
        for (step, numbers, keys, _), by_part in zip(self.steps_done, checked):
            refused = [(part, losses) for part, (finite, *losses) in zip(self.optimisers, by_part) if not finite]
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if refused else 0
            if not refused:
                continue
            self.skipped += 1
            self._say(f"step {step:,} skipped: {NOT_FINITE} ({self.skipped} so far)")
            (part, losses), batches = refused[0], []
            for number, loss, names in zip(numbers, losses, keys):
                samples = [index for _, index in self.batches.samples(number)]
                batch = {"rank": distributed.rank(), "batch": number, "samples": samples}
                batch["loss"] = loss if math.isfinite(loss) else str(loss)  # JSON has no NaN
                batches.append(batch | ({"keys": list(names)} if names is not None else {}))
            everyone = [batch for share in distributed.gather(batches) for batch in share]
            path = self.run / "bad_batches.jsonl"
            if distributed.is_main():
                with self._record_write_error(), path.open("a") as file:
                    line = {"step": step, "part": part, "reason": NOT_FINITE, "batches": everyone}
                    file.write(json.dumps(line) + "\n")
            if self.skipped_in_a_row >= self.config.give_up_after:
                distributed.fail(
                    f"training stopped at step {step}: {NOT_FINITE}, {self.skipped_in_a_row} steps in a row skipped; "
                    f"see {path} for their samples; fix the data or lower trainer.lr ({self.config.lr})"
                )
        self.steps_done.clear()

    @contextmanager
    def _record_write_error(self) -> Iterator[None]:
        """Keep an error of this process, such as a full disk, until all processes can stop together."""
        try:
            yield
        except (OSError, UserError) as error:
            if isinstance(error, OSError) and error.errno not in DISK_FULL:
                raise
            self.write_error = str(error)

    def _stop_on_write_error(self) -> None:
        """Wait for the checkpoint in progress; stop all processes if one of them could not write something."""
        self.checkpoints.wait()
        for problem in distributed.gather(self.write_error or self.checkpoints.problem):
            if problem:
                distributed.fail(f"training stopped after step {self.step}: {problem}")

    def _share_buffers(self) -> None:
        """Overwrite persistent buffers by those of rank 0, in training as in checkpoints."""
        distributed.broadcast(self.task.get_buffer(name) for name in self.buffers)

    def _numbers(self, count: int) -> range:
        """Return the numbers of this process's next `count` micro-batches."""
        world = distributed.world_size()
        first = self.position + distributed.rank()
        return range(first, first + count * world, world)

    def _state(self) -> dict[str, Tensor]:
        """Return everything that training changes, as a flat dict of tensors (references, not copies)."""
        state = {f"model.{k}": v for k, v in self.task.state_dict().items()}
        state |= {f"ema.{k}": v for k, v in self.ema.averages.items()}
        for part, optimiser in self.optimisers.items():
            for name, parameter in self.parameters[part].items():
                for key, value in optimiser.state[parameter].items():
                    state[f"optim.{part}.{name}.{key}"] = value
        return state

    def _save(self) -> None:
        self._stop_on_write_error()
        self._share_buffers()
        self._report_skipped()
        info = {"position": self.position, "config": self.record, "code": self.code, **self.batches.state()}
        info |= {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        self.checkpoints.save(self.step, self._state(), info)

    def _resume(self) -> None:
        root = self.run / "checkpoints"
        distributed.from_main(lambda: refuse_links(self.run))
        if self.fresh and not distributed.restarted():
            distributed.from_main(lambda: shutil.rmtree(root) if root.exists() else None)
        folder = distributed.from_main(lambda: checkpoint.newest(root, self._say))
        if folder is None:
            return
        for optimiser in self.optimisers.values():
            begin_state(optimiser)
        state = self._state()
        info = checkpoint.load(folder, state)
        for part, optimiser in self.optimisers.items():
            for name, p in self.parameters[part].items():
                if f"optim.{part}.{name}.step" not in state:
                    del optimiser.state[p]
        c, dataset = self.config, self.batches.dataset
        self.batches = MicroBatches(dataset, c.batch_size, c.seed, c.by_length, info.get("streams"))
        self.step, self.position = info["step"], self.batches.position(info)
        self.skipped, self.skipped_in_a_row = info.get("skipped", 0), info.get("skipped_in_a_row", 0)
        if distributed.from_main((folder / checkpoint.RESULTS).is_file):
            self.validated = self.step
        self._say(f"resumed from {folder}; init= is not read again, fresh=true starts anew")

    def _log(self, window: Window, tracker: Tracker | None) -> None:
        c, world = self.config, distributed.world_size()
        gc.collect(1)
        self._report_skipped()
        means = distributed.mean(window.means(), self.device)
        rates = window.rates(c.accumulate * self.batches.mean_size() * world, world, self.use)
        rates["memory_gib"] = max(distributed.gather(memory_gib(self.device)))
        if tracker:
            lr = c.lr_at(self.step - 1)
            with self._record_write_error():
                tracker.write({"step": self.step, **means, "lr": lr, **rates, "skipped": self.skipped})
            self._say(progress_line(self.step, c.steps, means, lr, rates, self.use.peak))

    def _say(self, line: str) -> None:
        if distributed.is_main():
            with suppress(OSError):  # its file may be on the full disk
                print(line, flush=True)
