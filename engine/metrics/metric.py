"""Interface of metrics: each clip is measured separately, and figures are ratios of sums over clips.

Each file of this package contains a metric, or several related ones, with reference, licence and requirements. A metric
computes one or more figures, the columns of a table; `engine.metrics.registry` maps their names to metrics.

To add a metric, write a subclass of `Metric` with `figures` and `measure`, and add it to `METRICS` of the registry. Its
figures can then be named in `metrics=[...]`, in `columns` of configs/table/*.yaml and in a recipe's `validate_metrics`.

Axes: N samples, F rows of features, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from engine.errors import UserError
from engine.evaluation.statistics import Statistic, ratio
from engine.media.audio import read_audio, resample_wave

Rows = Mapping[str, Mapping[str, Any]]  # maps each clip to its measurement
WEIGHTS = Path("checkpoints")  # as in configs/evaluate.yaml
FPS = 25  # video frames per second
CACHED = 8  # cache size for recent waveforms and videos, which are shared by several systems


@dataclass(frozen=True, eq=False)
class Waveform:
    """A waveform (N,) in memory at `rate` Hz, in place of a file."""

    wave: np.ndarray
    rate: int


@dataclass(frozen=True)
class Take:
    """One version of a clip: the output of a system, or the ground truth."""

    audio: Path | Waveform | None = None  # audio file, or waveform
    video: Path | None = None  # video file of this take
    source: Path | None = None  # input video, if the take itself has no video
    text: str | None = None  # spoken text
    heard: str | None = None  # an external transcript
    language: str = "en"  # language of the text
    speaker: str | None = None
    # Further fields: the manifest row of a ground-truth clip, or the system's ID.json of an output.
    about: Mapping[str, Any] = field(default_factory=dict)
    given: str | None = None  # "audio" or "video" if that stream was an input of the system
    bits: float | None = None  # bit rate of the code, in bits per second


ARROWS = {1: " ↑", -1: " ↓", 0: ""}  # by `Figure.better`, in tables


@dataclass(frozen=True)
class Figure:
    """One column of a table."""

    title: str  # column title
    better: int  # 1 if higher is better, -1 if lower is better, 0 if neither
    digits: int = 2  # number of decimals
    scale: float = 1.0  # factor of the printed value: 100 for per cent
    meaning: str = ""  # one-line description in the report
    statistic: Statistic = ratio  # or `correlation`, of the pairs of all clips


@dataclass(unsafe_hash=True)
class Metric:
    """Base class of metrics, which measure one clip at a time.

    A measurement maps the name of each figure to (a, b); the figure of many clips is sum(a) / sum(b), times its scale,
    or their correlation. A mean over clips has b = 1, and a word error rate has (errors, words). For the Frechet
    distance, which is a figure of the whole set, a measurement has features (F, D) instead. Figures that depend on
    several clips are computed by `finish` from the other values in the rows. Transcripts are shown in the report.
    """

    protocol: str = ""  # one of `protocols`, optionally followed by a colon and an argument: see `kind` and `argument`
    weights: Path = WEIGHTS  # folder with the downloaded networks
    device: str = "cpu"

    figures: ClassVar[Mapping[str, Figure]] = {}  # columns computed by the metric
    protocols: ClassVar[tuple[str, ...]] = ("",)  # names of the protocols; the first is the default
    version: ClassVar[int] = 1  # incremented when results for the same inputs change; invalidates cached values
    needs_truth: ClassVar[bool] = False  # whether the metric compares the take with the ground truth
    parallel: ClassVar[bool] = True  # whether several processes may share a GPU, which large networks do not fit
    outputs_only: ClassVar[bool] = False  # whether the metric does not apply to the ground truth
    needs_video: ClassVar[bool] = False  # whether the metric requires video
    trims: ClassVar[bool] = False  # whether output and ground truth are trimmed to the shorter length
    inputs: ClassVar[tuple[str, ...]] = ("audio",)  # attributes of the take on which the result depends
    packages: ClassVar[tuple[str, ...]] = ()  # modules that must be installed
    weight_files: ClassVar[tuple[str, ...]] = ()  # files below `weights`; changes invalidate cached results
    download: ClassVar[str] = "metrics"  # group of scripts/checkpoints.yaml with these files

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def kind(self) -> str:
        return self.protocol.partition(":")[0]

    @property
    def argument(self) -> str:
        return self.protocol.partition(":")[2]

    @property
    def files(self) -> list[Path]:
        return [self.weights / name for name in self.weight_files]

    def check(self) -> None:
        """Raise UserError if a package or file is missing. The message states how to install it."""
        missing = [name for name in self.packages if find_spec(name) is None]
        files = [str(file) for file in self.files if not file.exists()]
        why = []
        if missing:
            why.append(f"not installed: {', '.join(missing)} (bash scripts/setup.sh metrics)")
        if files:
            get = f"python scripts/download_checkpoints.py {self.download} --to {self.weights}"
            why.append(f"missing: {', '.join(files)} ({get})")
        if why:
            raise UserError("; ".join(why))

    def applies(self, take: Take) -> bool:
        """Return whether the metric applies to a take. It does not apply to a stream that was an input of the
        system.
        """
        picture = take.video or (take.source if "source" in self.inputs else None)
        if self.needs_video and picture is None:
            return False
        return take.given is None or bool({"audio", "video"} & {*self.inputs} - {take.given})

    def load(self) -> None:
        """Load networks and packages."""

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        """Return the measurement of a clip. Raise UserError if it cannot be measured."""
        raise NotImplementedError

    def finish(self, rows: Rows, true: Rows, truths: Mapping[str, Take]) -> Rows:
        """Return the rows of one system, with figures added that depend on several clips or on the ground truth.

        Args:
            rows: measurements of a system by clip.
            true: measurements of the ground-truth clips.
            truths: the ground-truth clips themselves.
        """
        return rows


class Evaluations(Metric):
    """Statistics that a system reports for an output in ID.json, as (a, b)."""

    figures: ClassVar = {
        "evaluations": Figure(
            "evaluations", 0, 1, meaning="network evaluations per clip, counted by guidance branch and window"
        )
    }
    inputs = ("about",)
    outputs_only = True

    def applies(self, take: Take) -> bool:
        return "evaluations" in take.about

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        return {"evaluations": tuple(take.about["evaluations"])}


class Bitrate(Metric):
    """Bit rate of the code, stated in system.json: levels x log2(codes) x frames per second."""

    figures: ClassVar = {"bitrate": Figure("bit/s", 0, 0, meaning="bit rate of the code")}
    inputs = ("bits",)
    outputs_only = True

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        if take.bits is None:
            raise UserError(
                'bit rate unknown: write {"bits_per_second": N} to system.json in the folder of the outputs'
            )
        return {"bitrate": (take.bits, 1)}


def cosine(one: np.ndarray, two: np.ndarray) -> float:
    """Return the cosine of two vectors (D,); 0 if one of them is zero."""
    return float(one @ two / (np.linalg.norm(one) * np.linalg.norm(two) + 1e-12))


def text_of(truth: Take) -> str:
    """Return the text of the ground truth."""
    if not truth.text:
        raise UserError("its text is unknown: set text in the manifest, or add ID.txt next to the ground-truth file")
    return truth.text


@lru_cache(CACHED)
def wave_of(audio: Path | Waveform | None, rate: int) -> np.ndarray:
    """Return the waveform (N,) float32 at `rate` Hz."""
    if audio is None:
        raise UserError("the clip has no audio")
    if isinstance(audio, Waveform):
        return resample_wave(audio.wave, audio.rate, rate)
    return read_audio(audio, rate)
