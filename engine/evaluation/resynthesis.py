"""Quality of resynthesised speech: word error rate, PESQ and STOI of decoded clips against the originals.

Axes: N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.evaluation.clips import Clip
from engine.evaluation.generate import generate_missing
from engine.evaluation.shares import ByClip, Share
from engine.evaluation.validation import measure_clips, words_by
from engine.media.audio import write_wav
from engine.metrics.metric import wave_of
from engine.shards.recordings import SpeechClip, load_clips

NAMES = {"wer": "wer_{}", "wer_free": "wer_{}_free", "stoi": "stoi_{}", "pesq_wide": "pesq_{}"}  # of a version


def score(
    clips: Sequence[SpeechClip],
    versions: Mapping[str, Sequence[np.ndarray]],
    rate: int,
    grammar: str | Path | None = None,
    numbers: Sequence[int] | None = None,
    device: str = "cpu",
) -> dict[str, ByClip]:
    """Figures over whole clips.

    Args:
        versions: name -> one wave (N,) for each clip, as long as the clip's.
        rate: of all waves.
        grammar: what hears the words, see `words_by`; what is not there is named in a line, and there are no words.
        numbers: of the clips among all clips of a validation, where others are measured elsewhere.

    Returns:
        `wer_clean` and for each version `wer_NAME`, `pesq_NAME`, `stoi_NAME`: those whose package is installed; means
        over clips, word error rate over words.
    """
    texts, true, results = [clip.text for clip in clips], [clip.wave for clip in clips], {}
    words, protocols = ["wer", "wer_free"], words_by(grammar)
    for name, waves in {"clean": true, **versions}.items():
        figures = words if name == "clean" else [*words, "stoi", "pesq_wide"]
        found = measure_clips(figures, texts, waves, true, rate, protocols, device=device, numbers=numbers)
        if name == "clean" and not found:  # nothing hears the words, or there are none: not to be tried again
            words = []
        for figure, value in found.items():
            results[NAMES[figure].format(name)] = value
    return results


def validate_codec(
    settings: Mapping[str, Any],
    rate: int,
    folder: Path,
    share: Share,
    measure: Callable[[list[SpeechClip], str | None, Sequence[int]], Mapping[str, ByClip]],
    decode: Callable[[SpeechClip], np.ndarray],
    distance: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> dict[str, float | ByClip]:
    """A process's share in the validation of a wave codec on held-out clips.

    The first process writes the first clip of each split to `folder`, as it was and decoded.

    Args:
        settings: `root` of the corpus, `splits`, and `clips` of each; `grammar`: what hears the words, see `words_by`.
        share: of the clips that this process measures.
        measure: from clips, the setting `grammar` and the clips' numbers to figures.
        decode: from a clip to its decoded wave.
        distance: between decoded and original wave, both (1, N) on `device`; reported as `mel`.
    """
    root, results = settings["root"], {}
    for split in settings["splits"]:
        clips = load_clips(root, split, settings["clips"], rate)
        if own := share.range(len(clips)):
            found = measure(share.pick(clips), settings.get("grammar"), own)
            results |= {f"{split}/{name}": value for name, value in found.items()}
        if not share.first:
            continue
        wave, decoded = clips[0].wave, decode(clips[0])
        results[f"{split}/mel"] = distance(*(torch.from_numpy(x)[None].to(device) for x in (decoded, wave))).item()
        write_wav(folder / f"{split}-original.wav", wave, rate)
        write_wav(folder / f"{split}-decoded.wav", decoded, rate)
    return results


def write_resynthesis(
    clips: Sequence[Clip], folder: Path, rate: int, decode: Callable[[np.ndarray], np.ndarray]
) -> None:
    """FOLDER/ID.wav of every clip, where it is missing: `decode` of its true speech, a wave (N,) at `rate` Hz."""

    def write(batch: Sequence[tuple[int, Clip]]) -> None:
        for _, clip in batch:
            wave = wave_of(clip.truth.audio, rate)
            write_wav(folder / f"{clip.id}.wav", fit_length(decode(wave), len(wave)), rate)

    generate_missing(clips, folder, 1, lambda clip: [clip.truth.audio], write)


def fit_length(wave: np.ndarray, samples: int) -> np.ndarray:
    """(N,) cut, or padded with zeros at the end, to `samples`."""
    return np.pad(wave[:samples], (0, max(0, samples - len(wave))))
