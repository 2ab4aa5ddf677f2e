"""Logging of a run: RUN/log.jsonl, and optionally wandb and TensorBoard.

Axes: T video frames, H height, W width, N samples.
"""

from __future__ import annotations

import io
import json
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import soundfile
import torch
from PIL import Image
from torch import Tensor

from engine.errors import UserError, require
from engine.files import report_os_errors, write_text
from engine.media.video import read_video
from engine.training.export import read_log
from engine.training.settings import TrainerConfig
from engine.training.speed import Utilisation

# TensorBoard does not support video files, only animated images
GIF_SIDE = 256
GIF_FPS = 12.5


def check_trackers(wandb: str, tensorboard: bool) -> None:
    """Raise UserError if a requested tracker is not installed or not logged in."""
    if tensorboard:
        require("torch.utils.tensorboard", "TensorBoard", "tensorboard")
    if wandb == "online":
        from wandb import api  # slow to import

        if not api.api_key:
            raise UserError("trainer.wandb=online: not logged in; run `wandb login` or set trainer.wandb=offline")


class Tracker:
    """Appends one JSON object per record to RUN/log.jsonl, and forwards it to wandb and TensorBoard.

    Args:
        run: the run's folder.
        start: the step from which the run continues, and whether it was validated. Later records, written before a
            kill, are dropped. The validation record of a step, which has no `lr`, follows its loss record.
        wandb: `off`, `offline` (stored in `run`) or `online`.
        tensorboard: whether to write event files to RUN/tensorboard.
        config: stored with the wandb run.
    """

    def __init__(self, run: Path, start: tuple[int, bool], wandb: str, tensorboard: bool, config: dict[str, Any]):
        run.mkdir(parents=True, exist_ok=True)
        path = run / "log.jsonl"
        kept = [line for line, record in read_log(path) if (record["step"], "lr" not in record) <= start]
        write_text(path, "".join(f"{line}\n" for line in kept))  # flush, so that a kill does not lose earlier records
        self._file = path.open("a")
        self._wandb = _begin_wandb(run, wandb, config) if wandb != "off" else None
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(run / "tensorboard", purge_step=start[0] + 1 if start[0] else None)

    def write(self, record: dict[str, Any]) -> None:
        """Log a record, which must have a `step`."""
        with report_os_errors(f"cannot write {self._file.name}"):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._wandb:
            self._wandb.log(record)
        if self._events:
            for name in record.keys() - {"step"}:
                self._events.add_scalar(name, record[name], record["step"])

    def media(self, step: int, folder: Path) -> None:
        """Log every WAV file (with its spectrogram) and MP4 file that a validation wrote below `folder`.

        The name of a file is validation/PATH WITHOUT SUFFIX/KIND, so that a clip has the same name at each step.
        """
        if not (self._wandb or self._events):
            return
        from engine.media.pictures import spectrogram  # imports OpenCV, which speech runs do not need

        for path in sorted(folder.rglob("*")):
            name = f"validation/{path.relative_to(folder).with_suffix('').as_posix()}"
            if path.suffix == ".wav":
                wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
                wave = wave.mean(1)
                picture = spectrogram(wave, rate).repeat(3, 0).repeat(3, 1)  # (H, W, 3) bytes
                if self._wandb:
                    sound = self._wandb.Audio(str(path))
                    image = self._wandb.Image(picture)
                    self._wandb.log({f"{name}/sound": sound, f"{name}/spectrogram": image, "step": step})
                if self._events:
                    self._events.add_audio(f"{name}/sound", wave[None], step, sample_rate=rate)
                    self._events.add_image(f"{name}/spectrogram", picture, step, dataformats="HWC")
            elif path.suffix == ".mp4":
                if self._wandb:
                    self._wandb.log({f"{name}/video": self._wandb.Video(str(path), format="mp4"), "step": step})
                if self._events:
                    self._add_gif(f"{name}/video", path, step)

    def _add_gif(self, name: str, path: Path, step: int) -> None:
        """Add a video to TensorBoard as an animated image."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        frames = [Image.fromarray(frame) for frame in read_video(path, GIF_FPS, GIF_SIDE)]
        gif = io.BytesIO()
        frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=1000 / GIF_FPS, loop=0)
        width, height = frames[0].size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif.getvalue())
        self._events.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        with suppress(OSError):  # the disk is full, which is reported elsewhere
            self._file.close()
        if self._wandb:
            self._wandb.finish()
        if self._events:
            self._events.close()


def _begin_wandb(run: Path, mode: str, config: dict[str, Any]) -> ModuleType:
    """Start or resume the wandb run of a folder. Return the package, which logs to this run.

    `step` is logged as a metric and used as the axis of all others: after a resume, wandb drops points that are older
    than its own counter, such as the pending validation of a stopped run.
    """
    import wandb  # slow to import, and most runs do without

    file = run / "wandb_id"  # a folder's name is not unique
    if not file.is_file():
        file.write_text(f"{secrets.token_hex(6)}\n")
    wandb.init(
        project="speaking-faces", name=run.name, id=file.read_text().strip(), resume="allow", dir=run, mode=mode,
        config=config, settings=wandb.Settings(quiet=True),
    )  # fmt: skip
    wandb.define_metric("step")
    wandb.define_metric("*", step_metric="step")
    return wandb


class Window:
    """Sums over the steps since the last log line. Losses stay on the device until the line is written."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.wait = 0.0
        self.steps = 0
        self.tokens = 0
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def next(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """Return the next batch and record the waiting time."""
        begin = time.perf_counter()
        batch = next(batches)
        self.wait += time.perf_counter() - begin
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block, such as that of saving, from the rates."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    def add(self, values: dict[str, Tensor], prefix: str) -> None:
        """Add the scalars of a step."""
        for key, value in values.items():
            self._sums[prefix + key] += value.detach()
            self._counts[prefix + key] += 1

    def means(self) -> dict[str, float]:
        """Return the means of the scalars over the steps that reported them. This requires a device sync."""
        keys = list(self._sums)
        sums = torch.stack([self._sums[key].double() for key in keys]).tolist()
        return {key: total / self._counts[key] for key, total in zip(keys, sums)}

    def rates(self, samples: float, processes: int, use: Utilisation) -> dict[str, float]:
        """Return the throughput of all processes, given `samples` per step.

        `data_wait` is the fraction of time spent waiting for data, and `mfu` the MFU of this process.
        """
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
    """Return a line that states parameters, steps and devices of the run."""
    counts = {part: sum(p.numel() for p in each.values()) / 1e6 for part, each in parameters.items()}
    parts = ", ".join(f"{part} ({count:.2f} M parameters)" for part, count in counts.items())
    place = f"{processes} x {device}" + (f" ({config.parallel})" if processes > 1 else "")
    return (
        f"training {parts}; {config.steps - step:,} of {config.steps:,} steps remaining on {place}, {config.precision}"
    )


def progress_line(
    step: int, steps: int, means: dict[str, float], lr: float, rates: dict[str, float], peak: float | None
) -> str:
    """Return the progress line of a step.

    Args:
        means: mean of each logged value since the last line.
        rates: speed, memory and, if `peak` is known, MFU and HFU.
        peak: peak performance in TFLOP/s to which MFU and HFU are relative.
    """
    values = " ".join(f"{key} {value:.4f}" for key, value in means.items())
    eta = timedelta(seconds=round((steps - step) * rates["step_s"]))
    use = f"MFU {rates['mfu']:.1%} HFU {rates['hfu']:.1%} of {peak:,.0f} TFLOP/s " if "mfu" in rates else ""
    return (
        f"step {step:,}/{steps:,} | {values} | lr {lr:.2e} | {rates['samples_per_s']:.1f} samples/s "
        f"{rates['tokens_per_s']:,.0f} tokens/s {use}{rates['memory_gib']:.1f} GiB wait {rates['data_wait']:.0%} "
        f"| ETA {eta}"
    )


def validation_line(step: int, results: dict[str, float], best: str | None) -> str:
    """Return a line with the metrics of a validation, and a second one if the metric of `trainer.best` is missing."""
    metrics = " ".join(f"{key} {value:.4g}" for key, value in results.items())
    line = f"step {step:,} | validation {metrics or 'has no metrics in this recipe'}"
    if best and best.split()[1] not in results:
        names = ", ".join(results) or "no metrics"
        line += f"\ntrainer.best={best!r}: no best checkpoint is kept, as the validation has {names}"
    return line
