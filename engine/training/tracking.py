"""The record of a run: RUN/log.jsonl always, wandb and TensorBoard if asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.files import atomic_output
from engine.optional import require
from engine.training.settings import TrainerConfig
from engine.training.sinks import Sink, TensorBoardSink, WandbSink, send_media
from engine.training.speed import Utilisation
from engine.untrusted import parse_json


def check_trackers(wandb: str, tensorboard: bool) -> None:
    """Refuse trackers that are not installed, or that nobody is logged in to."""
    if tensorboard:
        require("torch.utils.tensorboard", "TensorBoard", "tensorboard")
    if wandb == "online":
        from wandb import api  # slow to import

        if not api.api_key:
            raise UserError("trainer.wandb=online: nobody is logged in; run `wandb login` or set trainer.wandb=offline")


class Tracker:
    """Appends one JSON object a record to `run/log.jsonl`.

    Args:
        run: the run's folder.
        place: the step where the run goes on, and whether it was validated; later records, written before a kill, are
            dropped.
        wandb: `off`, `offline` (kept in `run`) or `online`.
        tensorboard: whether event files are written, too.
        config: stored with the wandb run.
    """

    def __init__(self, run: Path, place: tuple[int, bool], wandb: str, tensorboard: bool, config: dict[str, Any]):
        run.mkdir(parents=True, exist_ok=True)
        path = run / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _place(line) <= place]
        with atomic_output(path) as partial:  # a kill must not cost the log of the steps before
            partial.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a")
        self._sinks: list[Sink] = [WandbSink(run, wandb, config)] if wandb != "off" else []
        self._sinks += [TensorBoardSink(run, place[0])] if tensorboard else []

    def write(self, record: dict[str, Any]) -> None:
        """Store a record; it has a `step`.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self._file.name}: {error.strerror or error}") from error
        values = {k: v for k, v in record.items() if k != "step" and v is not None}
        for sink in self._sinks:
            sink.scalars(values, record["step"])

    def media(self, step: int, folder: Path) -> None:
        """Show the sounds, pictures and videos that a validation wrote into `folder`."""
        send_media(folder, "validation", step, self._sinks)

    def close(self) -> None:
        with suppress(OSError):  # the disk is full, which was already reported
            self._file.close()
        for sink in self._sinks:
            sink.close()


class Window:
    """Sums over the steps since the last log line; losses stay on the device until the line is written."""

    def __init__(self) -> None:
        self.start, self.wait, self.steps, self.tokens = time.perf_counter(), 0.0, 0, 0
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def next(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next of `batches`; the wait for it counts."""
        begin = time.perf_counter()
        batch = next(batches)
        self.wait += time.perf_counter() - begin
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in the block, such as saving, does not count in the rates."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    def add(self, values: dict[str, Tensor], good: Tensor, prefix: str) -> None:
        """Take in one step's scalars, if the step was `good`, () bool."""
        for key, value in values.items():
            key, value = prefix + key, torch.where(good, value.detach(), 0.0)
            self.sums[key] = self.sums.get(key, 0) + value
            self.counts[key] = self.counts.get(key, 0) + good.double()

    def means(self) -> dict[str, float]:
        """Of the scalars of good steps. Waits for the device."""
        keys = list(self.sums)
        values = torch.stack([self.sums[key].double() for key in keys] + [self.counts[key] for key in keys]).tolist()
        return {key: total / n for key, total, n in zip(keys, values, values[len(keys) :]) if n}

    def rates(self, samples: float, processes: int, use: Utilisation) -> dict[str, float]:
        """Speed of all processes together, from `samples` a step; `data_wait` is the share of time without data, `mfu`
        this process's utilisation of its device."""
        seconds = time.perf_counter() - self.start
        return {
            "samples_per_s": self.steps * samples / seconds,
            "tokens_per_s": self.tokens * processes / seconds,
            **use.share(self.tokens, self.steps, seconds),
            "data_wait": self.wait / seconds,
            "step_s": seconds / self.steps,
        }


def first_line(
    parameters: dict[str, dict[str, Tensor]], step: int, config: TrainerConfig, device: str, processes: int
) -> str:
    """What is trained, by part, how long and on what."""
    counts = {part: sum(p.numel() for p in each.values()) / 1e6 for part, each in parameters.items()}
    parts = ", ".join(f"{part} ({count:.2f} M parameters)" for part, count in counts.items())
    way = f" ({config.parallel})" if processes > 1 else ""
    left = f"{config.steps - step:,} of {config.steps:,} steps"
    return f"training {parts}; {left} to go on {processes} x {device}{way}, {config.precision}"


def progress_line(
    step: int, steps: int, means: dict[str, float], lr: float, rates: dict[str, float], peak: float | None
) -> str:
    """One line for a person; `peak` in TFLOP/s is what `mfu` is a share of."""
    values = " ".join(f"{key} {value:.4f}" for key, value in means.items())
    eta = timedelta(seconds=round((steps - step) * rates["step_s"]))
    use = f"MFU {rates['mfu']:.1%} HFU {rates['hfu']:.1%} of {peak:,.0f} TFLOP/s " if "mfu" in rates else ""
    return (
        f"step {step:,}/{steps:,} | {values} | lr {lr:.2e} | {rates['samples_per_s']:.1f} samples/s "
        f"{rates['tokens_per_s']:,.0f} tokens/s {use}{rates['memory_gib']:.1f} GiB wait {rates['data_wait']:.0%} "
        f"| ETA {eta}"
    )


def validation_line(step: int, results: dict[str, float], best: str | None) -> str:
    """What a validation found, and a second line if the figure that `trainer.best` names is not among it."""
    figures = " ".join(f"{key} {value:.4g}" for key, value in results.items())
    line = f"step {step:,} | validation {figures or 'gives no figures: the task measures none'}"
    if best and best.split()[1] not in results:
        names = ", ".join(results) or "no figures"
        line += f"\ntrainer.best={best!r}: no best is kept, as the validation gives {names}"
    return line


def _place(line: str) -> tuple[float, bool]:
    """Step of a record, and whether it is of the step's validation, which follows that of its losses."""
    try:
        record = parse_json(line, "log.jsonl")
        return float(record["step"]), "lr" not in record
    except (ValueError, KeyError, TypeError):
        return float("inf"), True  # a line cut short by a kill
