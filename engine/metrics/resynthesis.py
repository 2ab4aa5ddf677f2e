"""How much of speech is left after resynthesis: word error rate, PESQ, STOI of decoded clips against the originals.

Axes: N samples.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from engine.errors import UserError
from engine.media.corpus import Clip
from engine.metrics.recogniser import Recogniser, word_error_rate
from engine.metrics.speech import pesq_wb, stoi


def score(
    clips: Sequence[Clip],
    versions: Mapping[str, Sequence[np.ndarray]],
    rate: int,
    grammar: str | Path | None = None,
) -> dict[str, float]:
    """Figures over whole clips.

    Args:
        versions: name -> one wave (N,) for each clip, as long as the clip's.
        rate: of all waves.
        grammar: of the recogniser; without it, or without pocketsphinx, no word error rate.

    Returns:
        `wer_clean` and for each version `wer_NAME`, `pesq_NAME`, `stoi_NAME`: those whose package is installed; means
        over clips, word error rate over words.
    """
    have = {name: importlib.util.find_spec(name) is not None for name in ("pocketsphinx", "pesq", "pystoi")}
    recogniser = Recogniser(grammar) if grammar and have["pocketsphinx"] else None
    texts, results = [clip.text for clip in clips], {}
    if recogniser:
        results["wer_clean"] = word_error_rate(texts, [recogniser.transcribe(c.wave, rate) for c in clips])
    for name, waves in versions.items():
        pairs = list(zip(clips, waves, strict=True))
        if recogniser:
            results[f"wer_{name}"] = word_error_rate(texts, [recogniser.transcribe(w, rate) for w in waves])
        if have["pystoi"]:
            results[f"stoi_{name}"] = float(np.mean([stoi(c.wave, w, rate) for c, w in pairs]))
        if have["pesq"]:
            scores = []
            for clip, wave in pairs:
                try:
                    scores.append(pesq_wb(clip.wave, wave, rate))
                except UserError:  # no speech found in the clip
                    continue
            if scores:
                results[f"pesq_{name}"] = float(np.mean(scores))
    return results


def fit_length(wave: np.ndarray, samples: int) -> np.ndarray:
    """(N,) cut, or padded with zeros at the end, to `samples`."""
    return np.pad(wave[:samples], (0, max(0, samples - len(wave))))
