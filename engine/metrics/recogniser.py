"""Word recogniser for WER, with a grammar or a language model (pocketsphinx with its en-us acoustic model).

With a grammar, chance is about 80 % WER instead of 100 %: report a shuffled control with each result.

Axes: N samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError, require
from engine.media.audio import resample_wave

RATE = 16_000

# The default beams prune the correct path of a grammar search; these are wide enough.
SETTINGS = {
    "beam": 1e-150, "pbeam": 1e-150, "wbeam": 1e-100, "maxhmmpf": -1, "maxwpf": -1, "bestpath": False,
    "fwdflat": False, "remove_noise": False, "loglevel": "FATAL",
}  # fmt: skip


def hear(decoder: Any, wave: np.ndarray) -> None:
    """Decode a waveform (N,) at 16 kHz by pocketsphinx. The result is stored in `decoder` and does not depend on
    earlier calls.
    """
    decoder.reinit_feat()  # reset running statistics, which would affect the scores
    decoder.start_utt()
    if len(wave):
        decoder.process_raw((wave.clip(-1, 1) * 32767).astype("<i2").tobytes(), full_utt=True)
    decoder.end_utt()


class Recogniser:
    """Speech recogniser with a JSGF grammar, or with an n-gram language model that allows any word order.

    Args:
        file: the grammar, or a language model in ARPA format (`.arpa`). An optional pronunciation dictionary in CMU
            format has the same name with the suffix `.dict`.
    """

    def __init__(self, file: Path) -> None:
        pocketsphinx = require("pocketsphinx", "pocketsphinx")
        free = file.suffix == ".arpa"
        settings = {"lm": str(file), "loglevel": "FATAL"} if free else {"lm": None, **SETTINGS}
        if (pronunciations := file.with_suffix(".dict")).is_file():
            settings["dict"] = str(pronunciations)
        try:
            self._decoder = pocketsphinx.Decoder(pocketsphinx.Config(**settings))
            if not free:
                self._decoder.add_jsgf_string("grammar", file.read_text())
                self._decoder.activate_search("grammar")
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise UserError(f"the recogniser cannot use {file}: {error}; all its words must be English") from error

    def transcribe(self, wave: np.ndarray, rate: int) -> str:
        """Transcribe samples (N,) in [-1, 1] at `rate` Hz to lower-case words; "" if none are recognised."""
        hear(self._decoder, resample_wave(wave, rate, RATE))
        hypothesis = self._decoder.hyp()
        return hypothesis.hypstr.lower() if hypothesis else ""
