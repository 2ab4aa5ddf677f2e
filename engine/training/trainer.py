"""The training loop for a task and a dataset, with any number of processes.

Data order, augmentation and all random numbers of step n are functions of (seed, n). A resumed run therefore equals an
uninterrupted one, and W processes use the same data and random numbers as one process with `accumulate` W times larger.

The loss of a step is the mean over the elements (tokens, clips) of all micro-batches in all processes, so that it does
not depend on how the global batch is divided. Talker-T2AV's stop loss is an exception: the weight of its positive
labels is that of a micro-batch.
"""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.device import pick_device, to_device
from engine.errors import UserError
from engine.evaluation.validation import ByClip, Share, figures_of
from engine.files import refuse_links, write_failure
from engine.seeding import seed_for
from engine.training import checkpoint, distributed
from engine.training.batches import MicroBatches, TrainingSet, load_batches
from engine.training.checkpoint import Checkpoints
from engine.training.ema import ExponentialMovingAverage
from engine.training.export import describe, export
from engine.training.parallel import ParallelTask, adamw, clipping_groups, init_state
from engine.training.settings import TrainerConfig
from engine.training.signals import stop_requests
from engine.training.speed import Utilisation, backend_options, memory_gib, peak_tflops, tracing
from engine.training.task import Task
from engine.training.tracking import Tracker, Window, first_line, progress_line, validation_line

MOST_SAMPLES = 8  # maximum number of samples listed in the message about a non-finite step


class Trainer:
    """Trains `task` on `dataset` in the folder `run`: checkpoints/, validation/, log.jsonl.

    Args:
        task: see `Task`; it is moved to the device.
        dataset: see `engine.training.batches.TrainingSet`.
        config: settings, divided among the processes by `TrainerConfig.shared_among`.
        run: folder of this run. An earlier run in it is resumed.
        record: the complete config, which is stored with checkpoints and log.
        fresh: delete earlier checkpoints, unless torchrun or SLURM restarted this process.
    """

    def __init__(
        self,
        task: Task,
        dataset: TrainingSet,
        config: TrainerConfig,
        run: str | Path,
        record: dict[str, Any] | None = None,
        fresh: bool = False,
    ):
        self.config = config
        if len(dataset) == 0:
            raise UserError("the training set is empty: check data.root")
        self.run = Path(run)
        self.record = record or {}
        self.fresh = fresh
        self.code = checkpoint.code_version()
        self.device = pick_device(config.device)
        self.parallel = ParallelTask(task, config, self.device)
        self.task = self.parallel.task
        self.parameters = {}
        self.optimisers = {}
        self.clipped = {}
        for part, module in self.task.parts().items():
            self.parameters[part] = {k: p for k, p in module.named_parameters() if p.requires_grad}
            self.optimisers[part] = adamw(self.parameters[part].values(), config)
            self.clipped[part] = clipping_groups(self.parameters[part].values(), self.task.separate_clip_groups())
        self.ema = ExponentialMovingAverage(self.task, config.ema_decay)
        self.buffers = [name for name, _ in self.task.named_buffers() if name in self.task.state_dict()]
        samples_per_step = config.batch_size * config.accumulate * distributed.world_size()
        self.batches = MicroBatches(dataset, config.batch_size, config.seed, config.by_length, step=samples_per_step)
        self.checkpoints = Checkpoints(self.run / "checkpoints", config.keep, config.best)
        self.flags = distributed.AsyncFlags()
        self.use = Utilisation(peak_tflops(config.peak_tflops, self.device))
        self.step = 0  # steps done
        self.position = 0  # index of the next micro-batch, over all processes
        self.saved: int | None = None  # the last step with a checkpoint
        self.validated = 0  # the last step that was validated
        self.write_error: str | None = None  # write error of this process; training ends at the next step

    def fit(self) -> dict[str, float] | None:
        """Train until `config.steps` and validate.

        Returns:
            The results of the last validation ({} on ranks other than 0). None: stopped by SIGTERM, SIGUSR1 or
            Ctrl-C, after a checkpoint; run again to continue.

        Raises:
            UserError: If a gradient is not finite, or the disk is full. The last checkpoint is complete.
        """
        c = self.config
        self._resume()
        distributed.from_main(lambda: describe(self.run, self.task))
        first = self.step
        start = first, self.validated == first
        tracker = Tracker(self.run, start, c.wandb, c.tensorboard, self.record) if distributed.is_main() else None
        window = Window()
        stopping = False
        if self.step < c.steps:
            self._say(first_line(self.parameters, self.step, c, self.device.type, distributed.world_size()))
        else:
            self._say(
                f"{self.run} is finished: step {self.step:,} of {c.steps:,}. Its validation and release are repeated. "
                "To train again, set another run=FOLDER, or fresh=true"
            )
        self.task.train()
        try:
            with (
                stop_requests() as stops,
                tracing(self.run / "profile", c.profile, distributed.rank()) as trace,
                self._backend_options() as settings,
            ):
                self._say(settings)
                if self.step == 0 and c.sanity_validation:
                    self._sanity_check()
                numbers = self._numbers((c.steps - self.step) * c.accumulate)
                batches = load_batches(self.batches, numbers, c.workers, self.device, self.task.on_host)
                while self.step < c.steps and not stopping:
                    # Before the next step instead of after the last one, so that a run that stopped in between
                    # validates when resumed.
                    if self.step % c.validate_every == 0 and self.step > self.validated:
                        with window.paused():
                            self.validate(tracker)
                    if self.step == first:
                        with self.use.counting():
                            self.use.tokens = self._train_step(batches, window)
                    else:
                        self._train_step(batches, window)
                    if trace:
                        trace.step()
                    failing = bool(self.write_error or self.checkpoints.problem)
                    stopping, failed = self.flags.all_reduce(bool(stops), failing)  # in any process
                    if failed:
                        self._stop_on_write_error()
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
                self._say(f"stopped at step {self.step:,}, saved; the same command continues from here")
                return None
            with self._backend_options():
                return self.validate(tracker)
        finally:
            self.checkpoints.wait(failing=True)  # nothing is pending unless this process fails
            if tracker:
                tracker.close()

    def _backend_options(self) -> AbstractContextManager[str]:
        return backend_options(self.device, self.config.precision, self.batches.fixed_shapes)

    def validate(self, tracker: Tracker | None = None) -> dict[str, float]:
        """Validate the averaged weights, divided over all processes. Return the metrics on rank 0, and {} on other
        ranks.
        """
        folder = self.run / "validation" / f"step-{self.step:08d}"
        shares = self._measure(folder, Share(distributed.rank(), distributed.world_size()))
        results: dict[str, float] = {}
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

    def _measure(self, folder: Path, share: Share) -> list[dict[str, float | ByClip]]:
        """Return the measurements of each process with the averaged weights. Clips are written to `folder`.

        If one process fails, all of them stop, as the others would wait for it.
        """
        figures: dict[str, float | ByClip] = {}
        self._broadcast_buffers()
        with self.parallel.evaluation_copy(self.ema) as task:
            torch.manual_seed(seed_for(self.config.seed, "validate"))
            try:
                with self._record_write_error():
                    folder.mkdir(parents=True, exist_ok=True)
                    figures = task.measure(folder, share)
            except Exception as error:
                self.write_error = f"process {share.rank} failed in validation: {error!r}"
                # The other processes end like this; this one raises the original error.
                with suppress(UserError, SystemExit):
                    self._stop_on_write_error()
                raise
        self._stop_on_write_error()
        return distributed.all_gather(figures)

    def _sanity_check(self) -> None:
        """Measure one clip per process before the first step, to detect errors of the validation early."""
        world = distributed.world_size()
        folder = self.run / "validation" / "sanity"
        self._measure(folder, Share(distributed.rank(), world, most=world))
        distributed.from_main(lambda: shutil.rmtree(folder, ignore_errors=True))

    def release(self, folder: str | Path) -> None:
        """Write a release folder from the last checkpoint on rank 0, while the others wait."""
        distributed.from_main(lambda: export(self.run, folder))
        self._say(f"released to {folder}")

    def _train_step(self, batches: Iterator[dict[str, Any]], window: Window) -> int:
        """Update all parts with the next micro-batches. Return the number of tokens."""
        micro_batches = [window.next(batches) for _ in range(self.config.accumulate)]
        factors = self._loss_factors(micro_batches)
        self._broadcast_buffers()
        self.task.begin_step(self.step)
        for part, optimiser in self.optimisers.items():
            self.task.zero_grad(set_to_none=True)
            losses = [
                self._backward(part, micro, batch, factor)
                for micro, (batch, factor) in enumerate(zip(micro_batches, factors))
            ]
            grad_norm = self._clip(part)
            self._stop_unless_finite(grad_norm, part, losses)
            for group in optimiser.param_groups:
                group["lr"] = self.config.lr_at(self.step)
            optimiser.step()
            means = {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}
            window.add({**means, "grad_norm": grad_norm}, f"{part}/" if len(self.optimisers) > 1 else "")
        self.task.zero_grad(set_to_none=True)
        self.ema.update(self.step)
        tokens = sum(self.task.tokens(batch) for batch in micro_batches)
        window.steps += 1
        window.tokens += tokens
        self.step += 1
        self.position += self.config.accumulate * distributed.world_size()
        return tokens

    def _loss_factors(self, micro_batches: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Return for each micro-batch the factors () of the losses named in `Task.loss_counts`.

        The factor is the number of elements of the micro-batch divided by the mean number over all micro-batches of the
        step in all processes. The mean of the scaled losses is then the mean over all elements of the step.
        """
        counts = [self.task.loss_counts(batch) for batch in micro_batches]
        total = len(counts) * distributed.world_size()
        names = list(counts[0])
        if not names or total == 1:
            return [{} for _ in counts]
        elements = torch.tensor([[each[name] for name in names] for each in counts]).double()
        elements = to_device(elements, self.device)
        mean = distributed.all_reduce(elements.sum(0)) / total
        factors = (elements / mean.clamp(min=1e-9)).float()
        return [dict(zip(names, row.unbind())) for row in factors]

    def _backward(self, part: str, micro: int, batch: dict[str, Any], factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Accumulate the gradients of a part for a micro-batch. Return its losses ()."""
        c = self.config
        number = self._numbers(c.accumulate)[micro]
        # All parts of a step draw the same random numbers, those of the first part.
        torch.manual_seed(seed_for(c.seed, "step", next(iter(self.optimisers)), number))
        # Results stored in a batch for the next part are only kept if the step has a single micro-batch.
        batch = batch if c.accumulate == 1 else dict(batch)
        with self.parallel.micro_batch(last=micro + 1 == c.accumulate):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=c.precision == "bf16"):
                losses = self.parallel.losses(batch, part, factors)
            (losses["loss"] / c.accumulate).backward()
        return {name: value.detach().float() for name, value in losses.items()}

    def _clip(self, part: str) -> Tensor:
        """Clip the gradients of a part, each group by its own norm. Return the total norm () before clipping."""
        norms = [self.parallel.clip(group, self.config.clip or math.inf) for group in self.clipped[part]]
        return torch.stack([norm.to(self.device) for norm in norms]).norm()

    def _stop_unless_finite(self, grad_norm: Tensor, part: str, losses: list[dict[str, Tensor]]) -> None:
        """Save a checkpoint and end the run if a gradient is not finite. `grad_norm` is the same in all processes.

        This is the only synchronisation of a step with the device.
        """
        if grad_norm.isfinite():
            return
        self.task.zero_grad(set_to_none=True)
        if self.saved != self.step and part == next(iter(self.optimisers)):  # else a part has already been updated
            self._save()
        self._stop_on_write_error()
        bad: list[int] = []  # samples of micro-batches with a non-finite loss
        for number, each in zip(self._numbers(self.config.accumulate), losses):
            if not each["loss"].isfinite():
                bad += self.batches.samples(number)
        samples = [sample for samples_of_rank in distributed.all_gather(bad) for sample in samples_of_rank]
        listed = ", ".join(map(str, samples[:MOST_SAMPLES])) + (", ..." if len(samples) > MOST_SAMPLES else "")
        where = f"the loss of samples {listed} is not finite" if samples else "every loss is finite"
        distributed.fail(
            f"training stopped: the gradient of {part} in step {self.step + 1} is not finite ({where}); the last "
            f"checkpoint is of step {self.saved or 0}; fix the data or lower trainer.lr ({self.config.lr})"
        )

    @contextmanager
    def _record_write_error(self) -> Iterator[None]:
        """Store an error of this process, such as a full disk, until all processes can stop together."""
        try:
            yield
        except (OSError, UserError) as error:
            if isinstance(error, OSError) and write_failure(error) is None:
                raise
            self.write_error = str(error)

    def _stop_on_write_error(self) -> None:
        """Wait for the pending checkpoint. Stop all processes if one of them had a write error."""
        self.checkpoints.wait()
        for problem in distributed.all_gather(self.write_error or self.checkpoints.problem):
            if problem:
                distributed.fail(f"training stopped after step {self.step}: {problem}")

    def _broadcast_buffers(self) -> None:
        """Overwrite persistent buffers with those of rank 0, as in checkpoints."""
        distributed.broadcast(self.task.get_buffer(name) for name in self.buffers)

    def _numbers(self, count: int) -> range:
        """Return the indices of this process's next `count` micro-batches."""
        world = distributed.world_size()
        first = self.position + distributed.rank()
        return range(first, first + count * world, world)

    def _state(self) -> dict[str, Tensor]:
        """Return the complete training state as a flat dict of tensors (references, not copies)."""
        state = {f"model.{k}": v for k, v in self.task.state_dict().items()}
        state |= {f"ema.{k}": v for k, v in self.ema.averages.items()}
        for part, optimiser in self.optimisers.items():
            for name, parameter in self.parameters[part].items():
                for key, value in optimiser.state[parameter].items():
                    state[f"optim.{part}.{name}.{key}"] = value
        return state

    def _save(self) -> None:
        self._stop_on_write_error()
        self._broadcast_buffers()
        info = {"config": self.record, "code": self.code, **self.batches.state(self.position)}
        self.checkpoints.save(self.step, self._state(), info)
        self.saved = self.step

    def _resume(self) -> None:
        root = self.run / "checkpoints"
        distributed.from_main(lambda: refuse_links(self.run))
        if self.fresh and not distributed.restarted():
            distributed.from_main(lambda: shutil.rmtree(root) if root.exists() else None)
        folder = distributed.from_main(lambda: checkpoint.newest(root, self._say))
        if folder is None:
            return
        for optimiser in self.optimisers.values():
            init_state(optimiser)
        state = self._state()
        info = checkpoint.load(folder, state)
        for part, optimiser in self.optimisers.items():
            for name, p in self.parameters[part].items():
                if f"optim.{part}.{name}.step" not in state:
                    del optimiser.state[p]
        self.step = self.saved = info["step"]
        self.position = self.batches.resume(info)
        if distributed.from_main((folder / checkpoint.RESULTS).is_file):
            self.validated = self.step
        self._say(f"resumed from {folder}; init= is not read again; fresh=true starts again")

    def _log(self, window: Window, tracker: Tracker | None) -> None:
        c = self.config
        world = distributed.world_size()
        gc.collect(1)
        means = distributed.mean(window.means(), self.device)
        rates = window.rates(c.accumulate * c.batch_size * world, world, self.use)
        rates["memory_gib"] = max(distributed.all_gather(memory_gib(self.device)))
        if tracker:
            lr = c.lr_at(self.step - 1)
            with self._record_write_error():
                tracker.write({"step": self.step, **means, "lr": lr, **rates})
            self._say(progress_line(self.step, c.steps, means, lr, rates, self.use.peak))

    def _say(self, line: str) -> None:
        if distributed.is_main():
            with suppress(OSError):  # the log file may be on the full disk
                print(line, flush=True)
