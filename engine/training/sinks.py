"""Where a tracker sends figures and media beside log.jsonl: wandb and TensorBoard.

Axes: T video frames, H height, W width, N samples, C channels.
"""

from __future__ import annotations

import io
import secrets
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import numpy as np
import soundfile
from PIL import Image

from engine.errors import UserError
from engine.media.audio import mel_picture
from engine.media.video import read_video
from engine.optional import require

GIF_SIDE, GIF_FPS = 256, 12.5  # TensorBoard plays no video files, but moving pictures


class Sink(Protocol):
    """`step` is that of the run; names have slashes. Pictures are (H, W, 3) uint8."""

    def scalars(self, values: dict[str, float], step: int) -> None: ...

    def sound(self, name: str, path: Path, step: int) -> None: ...

    def picture(self, name: str, picture: np.ndarray, step: int) -> None: ...

    def video(self, name: str, path: Path, step: int) -> None: ...

    def close(self) -> None: ...


def send_media(folder: Path, prefix: str, step: int, sinks: list[Sink]) -> None:
    """Give every WAV (with its spectrogram), PNG or JPEG and MP4 below `folder` to the sinks; others are passed over.

    A file's name is PREFIX/its path without the suffix/what it is: the same clip has the same name at each step.
    """
    for path in sorted(folder.rglob("*")) if sinks else ():
        name = f"{prefix}/{path.relative_to(folder).with_suffix('').as_posix()}"
        for sink in sinks:
            match path.suffix.lower():
                case ".wav":
                    sink.sound(f"{name}/sound", path, step)
                    sink.picture(f"{name}/spectrogram", spectrogram(path), step)
                case ".png" | ".jpg":
                    sink.picture(f"{name}/picture", np.asarray(Image.open(path).convert("RGB")), step)
                case ".mp4":
                    sink.video(f"{name}/video", path, step)


def spectrogram(path: Path) -> np.ndarray:
    """Log-mel spectrogram of a WAV file, 80 dB deep, low bands at the bottom: (240, 3 x frames, 3) uint8."""
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mel = mel_picture(wave.mean(1), rate)
    shade = ((mel - mel.max()) / 80 + 1).clip(0, 1)[::-1]
    colours = matplotlib.colormaps["magma"](shade, bytes=True)[..., :3]
    return np.ascontiguousarray(colours.repeat(3, 0).repeat(3, 1))


class WandbSink:
    """A wandb run; `offline` keeps it in the run's folder. Raises UserError if wandb is not installed.

    The run's step is a figure of its own, `step`, and the axis of all others. wandb's own count of steps drops what is
    logged for one that has passed, and in a resumed run the steps before have passed: the validation that the run owes
    would be lost.
    """

    def __init__(self, run: Path, mode: str, config: dict[str, Any]) -> None:
        try:
            import wandb  # slow to import, and most runs do without
        except ImportError as error:
            raise UserError(
                f"trainer.wandb={mode} needs wandb ({error}): install it or set trainer.wandb=off"
            ) from error
        self._wandb = wandb
        kept = run / "wandb_id"  # a folder's name is not unique; without the file, as in older runs, a new run begins
        if not kept.is_file():
            kept.write_text(f"{secrets.token_hex(6)}\n")
        self._run = wandb.init(
            project="speaking-faces",
            name=run.name,
            id=kept.read_text().strip(),
            resume="allow",
            dir=run,
            mode=mode,
            config=config,
            settings=wandb.Settings(quiet=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def sound(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._wandb.Audio(str(path)), "step": step})

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        self._run.log({name: self._wandb.Image(picture), "step": step})

    def video(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._wandb.Video(str(path), format="mp4"), "step": step})

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink:
    """Event files in RUN/tensorboard; what was written for steps after `step`, before a kill, is hidden.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, run: Path, step: int) -> None:
        self._writer = require("torch.utils.tensorboard", "TensorBoard", "tensorboard").SummaryWriter(
            run / "tensorboard", purge_step=step + 1 if step else None
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def sound(self, name: str, path: Path, step: int) -> None:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
        self._writer.add_audio(name, wave.mean(1)[None], step, sample_rate=rate)

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def video(self, name: str, path: Path, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        frames = [Image.fromarray(frame) for frame in read_video(path, GIF_FPS, GIF_SIDE)]
        gif = io.BytesIO()
        frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=1000 / GIF_FPS, loop=0)
        width, height = frames[0].size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif.getvalue())
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        self._writer.close()
