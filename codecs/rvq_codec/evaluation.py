"""Quality of decoded speech: word error rate, PESQ and STOI with the first n levels, and use of the code books.

Axes: N samples, Q levels, K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from engine.evaluation.clips import Clip
from engine.evaluation.generate import write_facts
from engine.evaluation.resynthesis import fit_length, score, write_resynthesis
from engine.evaluation.shares import ByClip
from engine.settings import require_range
from engine.shards.recordings import SpeechClip
from rvq_codec.codebooks import count_codes, perplexity
from rvq_codec.codec import RVQCodec

BUNDLED = Path(__file__).resolve().parents[2] / "assets" / "rvq_tiny"


@torch.no_grad()
def resynthesise(
    codec: RVQCodec, clip: SpeechClip, levels: Sequence[int]
) -> tuple[torch.Tensor, dict[int, np.ndarray]]:
    """(codes (1, Q, L), {n: wave decoded from the first n levels, cut or padded to the clip's length})."""
    device = next(codec.parameters()).device
    codes = codec.encode(torch.from_numpy(clip.wave)[None, None].to(device))
    waves = {}
    for n in levels:
        waves[n] = fit_length(codec.decode(codes, n)[0, 0].float().cpu().numpy(), len(clip.wave))
    return codes.cpu(), waves


@torch.no_grad()
def write_outputs(
    clips: Sequence[Clip],
    folder: Path,
    device: str,
    weights: str | None = None,
    levels: int | None = None,
    **other: object,
) -> None:
    """FOLDER/ID.wav of every clip, decoded from the first `levels` levels; null: all. other: settings of models.

    Raises:
        UserError: the weights cannot be loaded, or the codec has fewer levels.
    """
    codec = RVQCodec.from_pretrained(weights or BUNDLED).to(device)
    levels = codec.levels if levels is None else levels
    require_range("generate.levels", levels, 1, codec.levels)
    bits = levels * np.log2(codec.codes) * codec.frame_rate
    write_facts(folder, "rvq_codec", weights, levels=levels, bits_per_second=float(bits))

    def decode(wave: np.ndarray) -> np.ndarray:
        codes = codec.encode(torch.from_numpy(wave.copy())[None, None].to(device))
        return codec.decode(codes, levels)[0, 0].float().cpu().numpy()

    write_resynthesis(clips, folder, codec.sample_rate, decode)


def evaluate(
    codec: RVQCodec, clips: Sequence[SpeechClip], levels: Sequence[int], grammar: str | Path | None = None
) -> dict[str, float | list[float]]:
    """Metrics over whole clips.

    Args:
        levels: how many levels to decode from, each.
        grammar: what hears the words, see `engine.evaluation.validation.words_by`.

    Returns:
        `wer_clean`, `wer_N`, `pesq_N`, `stoi_N` (those whose package is installed; means over clips, word error rate
        over words), `perplexity` and `used` (share of codes that occur), each a list with one entry a level.
    """
    return {name: value() for name, value in measure_clips(codec, clips, levels, grammar).items()}


def measure_clips(
    codec: RVQCodec,
    clips: Sequence[SpeechClip],
    levels: Sequence[int],
    grammar: str | Path | None = None,
    numbers: Sequence[int] | None = None,
) -> dict[str, ByClip]:
    """As `evaluate`, by clip. numbers: of the clips among all clips of a validation."""
    numbers = numbers or range(len(clips))
    counts: dict[int, torch.Tensor] = {}
    versions: dict[str, list[np.ndarray]] = {str(n): [] for n in levels}
    for number, clip in zip(numbers, clips):
        codes, waves = resynthesise(codec, clip, levels)
        counts[number] = count_codes(codes, codec.codes)
        for n, wave in waves.items():
            versions[str(n)].append(wave)
    codes = {"perplexity": ByClip(counts, _perplexity), "used": ByClip(counts, _used)}
    device = str(next(codec.parameters()).device)
    return score(clips, versions, codec.sample_rate, grammar, numbers, device) | codes


def _perplexity(counts: list[torch.Tensor]) -> list[float]:
    return [round(x, 1) for x in perplexity(sum(counts)).tolist()]


def _used(counts: list[torch.Tensor]) -> list[float]:
    return [round(x, 3) for x in (sum(counts) > 0).double().mean(-1).tolist()]
