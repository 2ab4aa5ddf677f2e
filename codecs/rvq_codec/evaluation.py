"""What is left of speech after coding: word error rate, PESQ, STOI with the first n levels, and use of the books.

Axes: N samples, Q levels, K codes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from engine.errors import UserError
from engine.metrics.recogniser import Recogniser, word_error_rate
from engine.metrics.speech import pesq_wb, stoi
from rvq_codec.codebooks import count_codes, perplexity
from rvq_codec.codec import RVQCodec
from rvq_codec.data import Clip


@torch.no_grad()
def resynthesise(codec: RVQCodec, clip: Clip, levels: Sequence[int]) -> tuple[torch.Tensor, dict[int, np.ndarray]]:
    """(codes (1, Q, L), {n: wave decoded from the first n levels, cut or padded to the clip's length})."""
    device = next(codec.parameters()).device
    codes = codec.encode(torch.from_numpy(clip.wave)[None, None].to(device))
    waves = {}
    for n in levels:
        wave = codec.decode(codes, n)[0, 0].float().cpu().numpy()[: len(clip.wave)]
        waves[n] = np.pad(wave, (0, len(clip.wave) - len(wave)))
    return codes.cpu(), waves


def evaluate(
    codec: RVQCodec, clips: Sequence[Clip], levels: Sequence[int], grammar: str | Path | None = None
) -> dict[str, float | list[float]]:
    """Metrics over whole clips.

    Args:
        levels: how many levels to decode from, each.
        grammar: of the recogniser; without it, or without pocketsphinx, no word error rate.

    Returns:
        `wer_clean`, `wer_N`, `pesq_N`, `stoi_N` (those whose package is installed; means over clips, word error rate
        over words), `perplexity` and `used` (share of codes that occur), each a list with one entry a level.
    """
    have = {name: importlib.util.find_spec(name) is not None for name in ("pocketsphinx", "pesq", "pystoi")}
    recogniser = Recogniser(grammar) if grammar and have["pocketsphinx"] else None
    counts = torch.zeros(codec.levels, codec.codebook_size, dtype=torch.int64)
    scores: dict[str, list[float]] = {}
    heard: dict[str, list[str]] = {}
    for clip in clips:
        codes, waves = resynthesise(codec, clip, levels)
        counts += count_codes(codes, codec.codebook_size)
        if recogniser:
            heard.setdefault("wer_clean", []).append(recogniser.transcribe(clip.wave, codec.sample_rate))
        for n, wave in waves.items():
            if recogniser:
                heard.setdefault(f"wer_{n}", []).append(recogniser.transcribe(wave, codec.sample_rate))
            if have["pystoi"]:
                scores.setdefault(f"stoi_{n}", []).append(stoi(clip.wave, wave, codec.sample_rate))
            if have["pesq"]:
                try:
                    scores.setdefault(f"pesq_{n}", []).append(pesq_wb(clip.wave, wave, codec.sample_rate))
                except UserError:  # no speech found in the clip
                    continue
    texts = [clip.text for clip in clips]
    results: dict[str, float | list[float]] = {k: word_error_rate(texts, v) for k, v in heard.items()}
    results |= {k: float(np.mean(v)) for k, v in scores.items() if v}
    results["perplexity"] = [round(x, 1) for x in perplexity(counts).tolist()]
    results["used"] = [round(x, 3) for x in (counts > 0).double().mean(-1).tolist()]
    return results
