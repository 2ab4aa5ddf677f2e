"""How utterances end: a model that decides itself when to stop may stop late, early, or never.

An output is in time with 0.02 to 0.3 s of quiet after the last speech, late with more and cut with less. Speech is what
is within 30 dB of the loudest moment. An output runs away if only the limit of its length ended it: `stopped` is false
in ID.json.
"""

from __future__ import annotations

from typing import Any, ClassVar

from engine.metrics.metric import Figure, Metric, Take, wave_of
from engine.metrics.speech import speech_end

RATE = 24_000
LATE, CUT = 0.3, 0.02  # seconds of quiet; the synthetic corpus has 0.12 s and more


class Endings(Metric):
    figures: ClassVar = {
        "ends_in_time": Figure("ends in time %", 1, 1, 100, "0.02 to 0.3 s after the last speech"),
        "ends_late": Figure("late %", -1, 1, 100, "over 0.3 s after the last speech"),
        "ends_cut": Figure("cut %", -1, 1, 100, "less than 0.02 s after the last speech"),
        "runs_away": Figure("runs away %", -1, 1, 100, "ended by the limit of its length"),
        "length_error": Figure("length s", -1, 2, meaning="difference to the length of the true clip in seconds"),
    }
    inputs = ("audio", "about")
    pair = True

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        wave, true = wave_of(take.audio, RATE), wave_of(truth.audio, RATE)
        quiet, stopped = len(wave) / RATE - speech_end(wave, RATE), bool(take.about.get("stopped", True))
        return {
            "ends_in_time": (float(stopped and CUT <= quiet <= LATE), 1),
            "ends_late": (float(quiet > LATE), 1),
            "ends_cut": (float(quiet < CUT), 1),
            "runs_away": (float(not stopped), 1),
            "length_error": (abs(len(wave) - len(true)) / RATE, 1),
        }
