"""Quality of decoded speech: word error rate, PESQ and STOI; and statistics of the latents.

Axes: N samples, T latent frames, Z latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.codec import load_codec
from engine.evaluation.clips import Clip
from engine.evaluation.generate import write_facts
from engine.evaluation.resynthesis import fit_length, score, write_resynthesis
from engine.evaluation.shares import ByClip
from engine.shards.recordings import SpeechClip
from whisperx_vae.codec import WhisperXVAE

BUNDLED = Path(__file__).resolve().parents[2] / "assets" / "whisperx_vae_tiny"


@torch.no_grad()
def resynthesise(codec: WhisperXVAE, clip: SpeechClip) -> tuple[Tensor, np.ndarray]:
    """(latents (T, Z), wave decoded from them, cut or padded to the clip's length)."""
    latents = codec.encode(torch.from_numpy(clip.wave)[None, None])
    wave = codec.decode(latents)[0, 0].float().cpu().numpy()
    return latents[0].cpu(), fit_length(wave, len(clip.wave))


@torch.no_grad()
def write_outputs(
    clips: Sequence[Clip], folder: Path, device: str, weights: str | None = None, **other: object
) -> None:
    """FOLDER/ID.wav of every clip, decoded from its latents. other: settings of models.

    Raises:
        UserError: the weights cannot be loaded.
    """
    codec = load_codec(weights or BUNDLED, {WhisperXVAE.kind: WhisperXVAE}).to(device)
    write_facts(folder, "whisperx_vae", weights)  # latents have no bits

    def decode(wave: np.ndarray) -> np.ndarray:
        return (
            codec.decode(codec.encode(torch.from_numpy(wave.copy())[None, None].to(device)))[0, 0].float().cpu().numpy()
        )

    write_resynthesis(clips, folder, codec.sample_rate, decode)


def evaluate(codec: WhisperXVAE, clips: Sequence[SpeechClip], grammar: str | Path | None = None) -> dict[str, float]:
    """Metrics over whole clips.

    Args:
        grammar: what hears the words, see `engine.evaluation.validation.words_by`.

    Returns:
        `wer_clean`, `wer_decoded`, `pesq_decoded`, `stoi_decoded` (those whose package is installed; see
        `engine.evaluation.resynthesis`), `latent_mean` (largest absolute mean of a channel), `latent_std` (mean over
        channels) and `latent_speed` (root mean square of a channel's change from frame to frame over its deviation).
    """
    return {name: value() for name, value in measure_clips(codec, clips, grammar).items()}


def measure_clips(
    codec: WhisperXVAE,
    clips: Sequence[SpeechClip],
    grammar: str | Path | None = None,
    numbers: Sequence[int] | None = None,
) -> dict[str, ByClip]:
    """As `evaluate`, by clip. numbers: of the clips among all clips of a validation."""
    numbers = numbers or range(len(clips))
    pairs = [resynthesise(codec, clip) for clip in clips]
    waves = {"decoded": [wave for _, wave in pairs]}
    latents = {number: z for number, (z, _) in zip(numbers, pairs)}
    figures = {"latent_mean": _largest_mean, "latent_std": _deviation, "latent_speed": _speed}
    device = str(next(codec.parameters()).device)
    results = score(clips, waves, codec.sample_rate, grammar, numbers, device)
    return results | {name: ByClip(latents, figure) for name, figure in figures.items()}


def _largest_mean(latents: list[Tensor]) -> float:
    return torch.cat(latents).mean(0).abs().max().item()


def _deviation(latents: list[Tensor]) -> float:
    return torch.cat(latents).std(0).mean().item()


def _speed(latents: list[Tensor]) -> float:
    steps, deviation = torch.cat([z.diff(dim=0) for z in latents]), torch.cat(latents).std(0)
    return (steps.square().mean(0).sqrt() / deviation.clamp_min(1e-6)).mean().item()
