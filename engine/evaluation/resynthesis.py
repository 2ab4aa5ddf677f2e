"""What codecs make of held-out clips: outputs of an evaluation, and figures of a trainer's validation.

Axes: N samples, T frames, H height, W width, S side, M motion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.codec import Codec, PortraitCodec
from engine.device import send
from engine.errors import UserError
from engine.evaluation.clips import Clip
from engine.evaluation.generate import generate_missing, write_facts, write_take
from engine.evaluation.validation import ByClip, Share, measure_clips
from engine.media.audio import write_wav
from engine.media.pictures import identity_to_tensor, to_bytes, video_to_tensor
from engine.media.video import read_video
from engine.metrics.metric import wave_of
from engine.settings import require_range
from engine.shards.recordings import load_clips

RATE, PORTRAIT_FPS = 24_000, 25  # of the sound beside a drawn face, and of its frames
NAMES = {"wer": "wer_{}", "wer_free": "wer_{}_free", "stoi": "stoi_{}", "pesq_wide": "pesq_{}"}  # of a version


def validate_codec(
    settings: Mapping[str, Any],
    codec: Codec,
    folder: Path,
    share: Share,
    versions: Callable[[np.ndarray], tuple[dict[str, np.ndarray], dict[str, Any]]],
    combine: Mapping[str, Callable[[list[Any]], Any]],
    distance: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, float | ByClip]:
    """Measure a process's share in the validation of a wave codec on held-out clips.

    The figures of each split are `wer_clean` and for each version `wer_NAME`, `pesq_NAME`, `stoi_NAME`: those whose
    package is installed; means over clips, word error rate over words. The first process writes the first clip of each
    split to `folder`, as it was and decoded.

    Args:
        settings: `root` of the corpus, `splits`, and `clips` of each; `grammar`: what hears the words, see `words_by`.
        share: of the clips that this process measures.
        versions: from a wave (N,) to decoded waves by name, the last of all codes, and what each figure of `combine`
            needs of the codes.
        combine: figures of the codes of all clips, from the values of single clips.
        distance: between decoded and original wave, both (1, N) on the codec's device; reported as `mel`.
    """
    results: dict[str, float | ByClip] = {}
    rate, device = codec.sample_rate, next(codec.parameters()).device
    for split in settings["splits"]:
        clips = load_clips(settings["root"], split, settings["clips"], rate)
        own = share.range(len(clips))
        made = [versions(clips[i].wave) for i in own]
        if own:
            waves = {
                name: [fit_length(w[name], len(clips[i].wave)) for i, (w, _) in zip(own, made)] for name in made[0][0]
            }
            found, words = {}, ["wer", "wer_free"]
            texts, true = [clips[i].text for i in own], [clips[i].wave for i in own]
            for name, made_waves in {"clean": true, **waves}.items():
                figures = words if name == "clean" else [*words, "stoi", "pesq_wide"]
                grammar = settings.get("grammar")
                measured = measure_clips(
                    figures, texts, made_waves, true, rate, grammar, device=str(device), numbers=own
                )
                if name == "clean" and not measured:  # nothing hears the words, or there are none: not tried again
                    words = []
                found |= {NAMES[figure].format(name): value for figure, value in measured.items()}
            found |= {k: ByClip({i: codes[k] for i, (_, codes) in zip(own, made)}, f) for k, f in combine.items()}
            results |= {f"{split}/{name}": value for name, value in found.items()}
        if not share.first:
            continue
        wave, decoded = clips[0].wave, fit_length([*made[0][0].values()][-1], len(clips[0].wave))
        results[f"{split}/mel"] = distance(*(torch.from_numpy(x)[None].to(device) for x in (decoded, wave))).item()
        write_wav(folder / f"{split}-original.wav", wave, rate)
        write_wav(folder / f"{split}-decoded.wav", decoded, rate)
    return results


@torch.inference_mode()
def write_resynthesis(
    codec: Codec, clips: Sequence[Clip], folder: Path, weights: str | None, levels: int | None = None
) -> None:
    """Write what a codec makes of the true speech or picture of every clip, where the output is missing.

    A portrait codec draws the motion of each clip on its first frame. The sound beside it is the given one.

    Args:
        weights: the codec's release folder; None: the bundled one. levels: how many levels of codes are decoded.
    """
    portrait = isinstance(codec, PortraitCodec)
    facts: dict[str, Any] = {"given": "audio"} if portrait else {}
    if hasattr(codec, "levels"):
        levels = codec.levels if levels is None else levels
        require_range("generate.levels", levels, 1, codec.levels)
        bits = levels * np.log2(codec.codes) * codec.frame_rate
        facts = {"levels": levels, "bits_per_second": float(bits)}
    write_facts(folder, codec.kind, weights, **facts)

    def write(batch: Sequence[tuple[int, Clip]]) -> None:
        for _, clip in batch:
            frames, rate = None, RATE if portrait else codec.sample_rate
            wave = wave_of(clip.truth.audio, rate)
            if portrait:
                if clip.truth.source is None:
                    raise UserError("no picture to rebuild: ID.mp4 in references=, or video in the manifest")
                frames, _ = rebuild(codec, read_video(clip.truth.source, PORTRAIT_FPS))
            else:
                wave = rebuild_wave(codec, wave, levels)
            write_take(folder, clip.id, wave, rate, frames, PORTRAIT_FPS)

    generate_missing(clips, folder, 1, lambda clip: [clip.truth.source if portrait else clip.truth.audio], write)


def rebuild_wave(codec: Codec, wave: np.ndarray, levels: int | None = None) -> np.ndarray:
    """Encode and decode a wave (N,) at the codec's rate; of levels of codes the first `levels`, None: all."""
    code = codec.encode(send(torch.from_numpy(wave.copy())[None, None], next(codec.parameters()).device))
    code = code if levels is None else code[:, :levels]
    return fit_length(codec.decode(code)[0, 0].float().cpu().numpy(), len(wave))


def rebuild(codec: PortraitCodec, frames: np.ndarray, face: np.ndarray | None = None) -> tuple[np.ndarray, Tensor]:
    """Draw the motion of frames (T, H, W, 3) on their first one, or on `face` (H, W, 3).

    Returns:
        (T, S, S, 3) bytes, and the motion codes (T, M).
    """
    device = next(codec.parameters()).device
    motion = codec.encode(video_to_tensor(frames, codec.size))  # which sends them part by part
    picture = identity_to_tensor(frames[0] if face is None else face, codec.size)
    return to_bytes(codec.decode(motion, codec.identity(send(picture, device)))), motion


def fit_length(wave: np.ndarray, samples: int) -> np.ndarray:
    """Cut (N,), or pad it with zeros at the end, to `samples`."""
    return np.pad(wave[:samples], (0, max(0, samples - len(wave))))
