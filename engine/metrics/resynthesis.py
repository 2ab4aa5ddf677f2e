"""Quality of resynthesised speech: word error rate, PESQ and STOI of decoded clips against the originals.

Axes: N samples.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.media.audio import write_wav
from engine.media.corpus import SpeechClip, load_clips
from engine.metrics.recogniser import Recogniser, word_error_rate
from engine.metrics.speech import pesq_wb, stoi


def score(
    clips: Sequence[SpeechClip],
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
        results["wer_clean"] = word_error_rate(texts, recogniser.transcribe_all((clip.wave for clip in clips), rate))
    for name, waves in versions.items():
        pairs = list(zip(clips, waves, strict=True))
        if recogniser:
            results[f"wer_{name}"] = word_error_rate(texts, recogniser.transcribe_all(waves, rate))
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


def validate_codec(
    settings: Mapping[str, Any],
    rate: int,
    folder: Path,
    measure: Callable[[list[SpeechClip], Path | None], Mapping[str, Any]],
    decode: Callable[[SpeechClip], np.ndarray],
    distance: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> dict[str, float]:
    """Validation of a wave codec on held-out clips; writes the first clip of each split to `folder`, as it was and
    decoded.

    Args:
        settings: `root` of the corpus, `splits`, and `clips` of each.
        measure: from clips and the recogniser's grammar (None if the corpus has none) to figures; lists are averaged.
        decode: from a clip to its decoded wave.
        distance: between decoded and original wave, both (1, N) on `device`; reported as `mel`.
    """
    root, results = Path(settings["root"]), {}
    grammar = root / "grammar.jsgf"
    for split in settings["splits"]:
        clips = load_clips(root, split, settings["clips"], rate)
        found = measure(clips, grammar if grammar.is_file() else None)
        results |= {f"{split}/{name}": float(np.mean(value)) for name, value in found.items()}
        wave, decoded = clips[0].wave, decode(clips[0])
        results[f"{split}/mel"] = distance(*(torch.from_numpy(x)[None].to(device) for x in (decoded, wave))).item()
        write_wav(folder / f"{split}-original.wav", wave, rate)
        write_wav(folder / f"{split}-decoded.wav", decoded, rate)
    return results


def fit_length(wave: np.ndarray, samples: int) -> np.ndarray:
    """(N,) cut, or padded with zeros at the end, to `samples`."""
    return np.pad(wave[:samples], (0, max(0, samples - len(wave))))
