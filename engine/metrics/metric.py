"""What a metric of an evaluation is: it measures one clip at a time, and its figures are sums over sums.

A file of this package holds one metric with its reference, its licence, what it needs and which package does the work.
`engine.metrics.registry` knows them by the names of their figures.

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

Rows = Mapping[str, Mapping[str, Any]]  # measurements by clip
WEIGHTS = Path("checkpoints")  # as in configs/evaluate.yaml
CACHED = 8  # waves and videos of the last files, which several systems are compared with


@dataclass(frozen=True, eq=False)
class Sound:
    """A wave in memory (N,) at `rate` Hz, in place of a file."""

    wave: np.ndarray
    rate: int


@dataclass(frozen=True)
class Take:
    """One clip as one system gives it, or as it was recorded."""

    audio: Path | Sound | None = None  # the file with its speech, or its wave
    video: Path | None = None  # the file with the picture that belongs to this take
    source: Path | None = None  # the picture that the speech was made for, where the take has none of its own
    text: str | None = None  # the words
    heard: str | None = None  # a transcript made elsewhere
    language: str = "en"  # of the words
    speaker: str | None = None
    # What else is known: of the ground-truth clip its row of the manifest, of an output what its system wrote in
    # ID.json.
    about: Mapping[str, Any] = field(default_factory=dict)
    given: str | None = None  # audio or video if that stream was given to the system and is not its own work
    bits: float | None = None  # a second of the code that the speech was decoded from


@dataclass(frozen=True)
class Figure:
    """One column of a table."""

    title: str  # head of the column
    better: int  # 1 if larger is better, -1 if smaller is, 0 if neither
    digits: int = 2  # after the point
    scale: float = 1.0  # the printed value for a ratio of 1: 100 for per cent
    meaning: str = ""  # one line for the reader of a report
    statistic: Statistic = ratio  # or correlation, of the pairs of all clips


@dataclass(unsafe_hash=True)
class Metric:
    """Measures single clips, once it is loaded.

    A measurement maps the name of each figure to (a, b); the figure of many clips is sum(a) / sum(b), times its scale,
    or their correlation. A mean over clips has b = 1, a word error rate (errors, words). A figure of a whole set is the
    Frechet distance of its features from the true ones: a measurement has rows of them (F, D) instead. Figures that
    need other clips, too, are made by `finish` of the other values in the rows. A transcript is shown in the report.
    """

    protocol: str = ""  # one of `protocols`, with what that needs after a colon: see `kind` and `argument`
    weights: Path = WEIGHTS  # folder of the downloaded networks
    device: str = "cpu"

    figures: ClassVar[Mapping[str, Figure]] = {}  # the columns that it fills
    protocols: ClassVar[tuple[str, ...]] = ("",)  # names of the ways to measure; the first one is the default
    version: ClassVar[int] = 1  # raised when the same inputs give other values, which are not taken from a cache then
    pair: ClassVar[bool] = False  # whether the true take is needed besides the one that is measured
    parallel: ClassVar[bool] = True  # whether several processes may measure at once on a GPU; large networks may not
    outputs_only: ClassVar[bool] = False  # whether the ground-truth clips have no such figure
    pictured: ClassVar[bool] = False  # whether takes without a picture have no such figure
    cuts: ClassVar[bool] = False  # whether the longer of output and ground truth is cut to the length of the other
    inputs: ClassVar[tuple[str, ...]] = ("audio",)  # attributes of the measured take that the result depends on
    needs: ClassVar[tuple[str, ...]] = ()  # modules that must be installed
    names: ClassVar[tuple[str, ...]] = ()  # files below `weights`; a result holds until one of them changes
    download: ClassVar[str] = "metrics"  # the group of configs/checkpoints.yaml that has them

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
        return [self.weights / name for name in self.names]

    def check(self) -> None:
        """Raise UserError if a package or a file is missing; the message says how to get it."""
        packages = [name for name in self.needs if find_spec(name) is None]
        files = [str(file) for file in self.files if not file.exists()]
        why = []
        if packages:
            why.append(f"not installed: {', '.join(packages)} (bash scripts/setup.sh metrics)")
        if files:
            get = f"python scripts/download_checkpoints.py {self.download} --to {self.weights}"
            why.append(f"not there: {', '.join(files)} ({get})")
        if why:
            raise UserError("; ".join(why))

    def applies(self, take: Take) -> bool:
        """Return whether a take can have the figures: it has none of a stream that was given to its system."""
        picture = take.video or (take.source if "source" in self.inputs else None)
        if self.pictured and picture is None:
            return False
        return take.given is None or bool({"audio", "video"} & {*self.inputs} - {take.given})

    def load(self) -> None:
        """Load networks and packages."""

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        """Return the measurement of a clip; raise UserError if it cannot be measured."""
        raise NotImplementedError

    def finish(self, rows: Rows, true: Rows, truths: Mapping[str, Take]) -> Rows:
        """Return the rows of one system with the figures that need the rows of other clips, or of the true ones.

        Args:
            rows: measurements of a system by clip. true: of the ground-truth clips. truths: the ground-truth clips
                themselves.
        """
        return rows


class Stated(Metric):
    """What a system itself states of an output in ID.json, as (a, b): its cost."""

    figures: ClassVar = {
        "evaluations": Figure(
            "evaluations", -1, 1, meaning="clips that the network was given, by guidance branch and window"
        )
    }
    inputs = ("about",)
    outputs_only = True

    def applies(self, take: Take) -> bool:
        return "evaluations" in take.about

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        return {"evaluations": tuple(take.about["evaluations"])}


class Bitrate(Metric):
    """What system.json states of all outputs: the bits per second of their code, levels x log2(codes) x frames."""

    figures: ClassVar = {"bitrate": Figure("bit/s", -1, 0, meaning="of the code that the speech was decoded from")}
    inputs = ("bits",)
    outputs_only = True

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        if take.bits is None:
            raise UserError('not stated: write {"bits_per_second": N} to system.json in the folder of the outputs')
        return {"bitrate": (take.bits, 1)}


def cosine(one: np.ndarray, two: np.ndarray) -> float:
    """Return the cosine of two vectors (D,); 0 if one of them is zero."""
    return float(one @ two / (np.linalg.norm(one) * np.linalg.norm(two) + 1e-12))


def text_of(truth: Take) -> str:
    """Return the words of the ground-truth clip."""
    if not truth.text:
        raise UserError("its words are not known: give text in the manifest, or ID.txt beside the true file")
    return truth.text


@lru_cache(CACHED)
def wave_of(audio: Path | Sound | None, rate: int) -> np.ndarray:
    """Return samples (N,) float32 at `rate` Hz."""
    if audio is None:
        raise UserError("the clip has no audio")
    if isinstance(audio, Sound):
        return resample_wave(audio.wave, audio.rate, rate)
    return read_audio(audio, rate)
