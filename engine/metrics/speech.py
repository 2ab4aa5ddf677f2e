"""Prosody, utterance endings, and correlation of mouth opening with loudness.

- Prosody: correlation of pitch range and energy with the ground truth, and whether they change in the same direction
  where the expression changes. Pitch by pYIN (Mauch and Dixon 2014; package librosa, ISC). The manifest's row of a clip
  that changes its expression has `change` (seconds), `phonemes` (name, start, end) and `expressions` (names by half
  second). The expected direction is that of the means over all ground-truth segments of the two expressions.
- Pitch contour: correlation and RMSE of log F0 against the ground truth, over frames in which both are voiced.
- Endings: a model with a stop predictor may stop late, early, or never. An output ends in time with 0.02 to 0.3 s of
  silence after the last speech, late with more, and is cut off with less. `runs_away` counts outputs that ended only at
  the length limit (`stopped` is false in ID.json).
- Synchrony: per-clip correlation of mouth opening with loudness. The estimator of mouth opening is specific to a kind
  of face: `drawn` is for the synthetic corpus, followed by a colon and a class that maps frames (T, H, W, 3) to
  openings (T,). The controls shift the audio by 200 ms.

Axes: N samples, F analysis frames, T video frames (25 per second).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from engine.errors import UserError, require_librosa
from engine.evaluation.statistics import correlation
from engine.instantiate import target
from engine.media.audio import loudness, resample_wave
from engine.media.video import read_video
from engine.metrics.metric import CACHED, FPS, Figure, Metric, Rows, Take, wave_of

RATE = 24_000
WINDOW = 0.01  # seconds per power measurement
PITCH_HOP = 0.016  # seconds per frame of `pitch`
FRAMES = 1 / PITCH_HOP  # a second
# search range of the pitch in Hz
LOWEST = 60.0
HIGHEST = 500.0
MIN_VOICED = 10  # minimum number of frames for comparing two pitch contours
DROP = 30.0  # speech threshold in dB below the maximum
# seconds of silence; the synthetic corpus has at least 0.12 s
LATE = 0.3
CUT = 0.02
SHIFT = 5  # video frames: 200 ms
NAMES = ("pitch_range", "energy")
WAY = "changes in the expected direction where the expression changes"


def pitch_range(f0: np.ndarray) -> float:
    """Return the range in semitones from the 10th to the 90th percentile of the voiced frames of a pitch contour (F,);
    0 with under 5 voiced frames.
    """
    voiced = f0[f0 > 0]
    return float(12 * np.log2(np.percentile(voiced, 90) / np.percentile(voiced, 10))) if len(voiced) > 4 else 0.0


def energy(wave: np.ndarray) -> float:
    """Return the mean power of a waveform (N,) in dB."""
    return float(10 * np.log10(np.mean(np.square(wave)) + 1e-10))


def pitch(wave: np.ndarray, rate: int) -> np.ndarray:
    """Estimate the pitch (F,) in Hz every 16 ms of a waveform (N,), 0 where unvoiced, by pYIN (Mauch & Dixon 2014).

    The Viterbi search of pYIN is necessary: frame-wise estimates of resynthesised speech have many octave errors, and
    pitch ranges then correlate less with the originals (0.62 instead of 0.89, 20 clips).
    """
    librosa = require_librosa()
    low_rate = 12_000
    wave = resample_wave(wave, rate, low_rate)
    f0, _, _ = librosa.pyin(wave, fmin=LOWEST, fmax=HIGHEST, sr=low_rate, frame_length=768, hop_length=192)
    return np.nan_to_num(f0)


def synchrony(opening: np.ndarray, wave: np.ndarray, rate: int, shift: int = 0) -> float:
    """Return Pearson's correlation of mouth opening (T,) and audio loudness, over the common frames.

    Args:
        shift: delay of the audio relative to the mouth, in frames.
    """
    mouth = opening[max(shift, 0) :]
    level = loudness(wave, rate)[max(-shift, 0) :]
    length = min(len(mouth), len(level))
    mouth = mouth[:length]
    level = level[:length]
    if len(mouth) < 2 or np.ptp(mouth) == 0 or np.ptp(level) == 0:
        return 0.0
    return float(np.corrcoef(mouth, level)[0, 1])


def speech_end(wave: np.ndarray, rate: int) -> float:
    """Return the end time in seconds of the last 10 ms within 30 dB of the maximum; 0 for silence.

    Only the energy is used, without a recogniser.
    """
    size = round(WINDOW * rate)
    windows = np.pad(wave, (0, -len(wave) % size)).reshape(-1, size)
    power = np.mean(np.square(windows, dtype=np.float64), 1)
    if not power.any():
        return 0.0
    return float((np.flatnonzero(power > power.max() * 10 ** (-DROP / 10))[-1] + 1) * WINDOW)


class Prosody(Metric):
    figures: ClassVar = {
        "pitch_range_correlation": Figure(
            "pitch r", 1, 2, 1, "pitch range: correlation with the ground truth", correlation
        ),
        "energy_correlation": Figure("energy r", 1, 2, 1, "energy: correlation with the ground truth", correlation),
        "pitch_range_right_way": Figure("pitch direction %", 1, 1, 100, f"pitch range {WAY}"),
        "energy_right_way": Figure("energy direction %", 1, 1, 100, f"energy {WAY}"),
    }
    packages = ("librosa",)

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        wave = wave_of(take.audio, RATE)
        f0 = pitch(wave, RATE)
        row = truth.about
        parts = []
        for start, end in spans_around_change(row) if row.get("change") is not None else ():
            part = wave[int(start * RATE) : int(end * RATE)]
            parts.append((pitch_range(f0[int(start * FRAMES) : int(end * FRAMES)]), energy(part)))
        return {"whole": (pitch_range(f0), energy(wave)), "around_change": parts}

    def finish(self, rows: Rows, true: Rows, truths: Mapping[str, Take]) -> Rows:
        finished = {clip: dict(row) for clip, row in rows.items()}
        means: dict[str, list[Any]] = {}
        for clip, row in true.items():
            for name, part in zip(ends_of(truths[clip]), row["around_change"]):
                means.setdefault(name, []).append(part)
        levels = {name: np.mean(parts, 0) for name, parts in means.items()}
        for clip, row in finished.items():
            pairs = zip(NAMES, true[clip]["whole"], row["whole"]) if clip in true else ()
            row |= {f"{name}_correlation": (own, made) for name, own, made in pairs}
            ends = ends_of(truths[clip]) if row["around_change"] and np.isfinite(row["around_change"]).all() else ()
            if ends and levels.keys() >= {*ends}:
                first, second = ends
                moved = np.sign(np.diff(row["around_change"], axis=0)[0])
                right = moved == np.sign(levels[second] - levels[first])
                row |= {f"{name}_right_way": (float(value), 1) for name, value in zip(NAMES, right)}
        return finished


class PitchContour(Metric):
    figures: ClassVar = {
        "f0_correlation": Figure("F0 r", 1, 2, meaning="temporal correlation of log F0 with the ground truth"),
        "log_f0_rmse": Figure("log F0 RMSE", -1, 3, meaning="RMSE of log F0 against the ground truth, in nepers"),
    }
    packages = ("librosa",)
    needs_truth = True

    def load(self) -> None:
        self.pitch_of = lru_cache(CACHED)(lambda path: pitch(wave_of(path, RATE), RATE))

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        made = self.pitch_of(take.audio)
        true = self.pitch_of(truth.audio)
        frames = min(len(made), len(true))
        made = made[:frames]
        true = true[:frames]
        voiced = (made > 0) & (true > 0)
        if voiced.sum() < MIN_VOICED:
            raise UserError(f"fewer than {MIN_VOICED} frames are voiced in both")
        made = np.log(made[voiced])
        true = np.log(true[voiced])
        return {
            "f0_correlation": (float(correlation(np.stack([made, true], -1))), 1),
            "log_f0_rmse": (float(np.sqrt(np.mean((made - true) ** 2))), 1),
        }


def ends_of(truth: Take) -> tuple[str, str]:
    """Return the first and the last expression of a clip whose expression changes."""
    expressions = truth.about.get("expressions") or [""]
    return expressions[0], expressions[-1]


def spans_around_change(row: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return the time spans of speech before and after the change of expression, in seconds."""
    times = [times for _, *times in row["phonemes"]]
    parts = [[t for t in times if (t[0] >= row["change"] - 1e-6) == after] for after in (False, True)]
    return [(part[0][0], part[-1][1]) for part in parts]


class Endings(Metric):
    figures: ClassVar = {
        "ends_in_time": Figure("ends in time %", 1, 1, 100, "0.02 to 0.3 s after the last speech"),
        "ends_late": Figure("late %", -1, 1, 100, "over 0.3 s after the last speech"),
        "ends_cut": Figure("cut %", -1, 1, 100, "less than 0.02 s after the last speech"),
        "runs_away": Figure("runs away %", -1, 1, 100, "ended at the length limit"),
        "length_error": Figure("length s", -1, 2, meaning="difference to the length of the ground truth, in seconds"),
    }
    inputs = ("audio", "about")
    needs_truth = True

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        wave = wave_of(take.audio, RATE)
        true = wave_of(truth.audio, RATE)
        quiet = len(wave) / RATE - speech_end(wave, RATE)
        stopped = bool(take.about.get("stopped", True))
        return {
            "ends_in_time": (float(stopped and CUT <= quiet <= LATE), 1),
            "ends_late": (float(quiet > LATE), 1),
            "ends_cut": (float(quiet < CUT), 1),
            "runs_away": (float(not stopped), 1),
            "length_error": (abs(len(wave) - len(true)) / RATE, 1),
        }


class Synchrony(Metric):
    figures: ClassVar = {
        "synchrony": Figure("mouth and audio", 1, 3, meaning="correlation of mouth opening and loudness"),
        "synchrony_late": Figure("200 ms late", 0, 3, meaning="control: synchrony with the audio delayed by 200 ms"),
        "synchrony_early": Figure("200 ms early", 0, 3, meaning="control: synchrony with the audio advanced by 200 ms"),
    }
    protocols = ("drawn", "landmarks")
    version = 2
    inputs = ("audio", "video", "source")
    needs_video = True

    def load(self) -> None:
        self.read_opening = _reader(self.argument)

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        opening = self.read_opening(take.video or take.source)
        wave = wave_of(take.audio, RATE)
        shifts = {"synchrony": 0, "synchrony_late": SHIFT, "synchrony_early": -SHIFT}
        return {name: (synchrony(opening, wave, RATE, shift), 1) for name, shift in shifts.items()}


class MouthOpening(Metric):
    figures: ClassVar = {
        "mouth_opening": Figure("mouth r", 1, 3, meaning="temporal correlation of mouth opening with the ground truth")
    }
    protocols = ("drawn", "landmarks")
    version = 2
    inputs = ("video",)
    needs_truth = True
    outputs_only = True
    needs_video = True

    def load(self) -> None:
        self.read_opening = _reader(self.argument)

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        made = self.read_opening(take.video)
        true = self.read_opening(truth.video)
        length = min(len(made), len(true))
        if np.ptp(made[:length]) == 0 or np.ptp(true[:length]) == 0:
            raise UserError("the mouth does not move")
        return {"mouth_opening": (float(np.corrcoef(true[:length], made[:length])[0, 1]), 1)}


@lru_cache(1)
def _reader(name: str) -> Any:
    read = target(name)()  # fitted at this point, which takes seconds
    return lru_cache(CACHED)(lambda path: read(read_video(path, FPS)))
