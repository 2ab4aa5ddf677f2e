"""Which levels of a tokenizer carry words, voice and prosody (HiCoDiT, Figure 2).

Held-out clips are decoded from their first one, two, ... levels of codes. For each number of levels: word errors,
cosine of the GE2E voice vectors of clip and decoded clip, and correlation over clips of pitch range and of energy with
the true clips. Any tokenizer (`--codec checkpoints/maskgct`) and any corpus of recordings or prepared shards will do.

Axes: K levels, k of them that are decoded, L frames, N samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.charts import chart_file
from engine.codec import Codec, load_codec
from engine.evaluation.shares import figures_of
from engine.evaluation.statistics import correlation
from engine.evaluation.validation import measure_clips, words_by
from engine.metrics.speaker import GE2EEncoder
from engine.metrics.speech import prosody
from engine.progress import track
from engine.record import dated
from engine.shards.recordings import load_clips
from hicodit.system import CODECS

LEAST: dict[str, float] = {"clips": 3, "levels": 1}
WORDS = ("wer", "wer_free")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--codec", type=Path, default=Path("assets/rvq_tiny"), help="release folder or official files")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of recordings or of prepared shards")
    parser.add_argument("--split", default="dev", help="split of the corpus")
    parser.add_argument("--clips", type=int, default=40, help="number of clips")
    parser.add_argument("--levels", type=int, nargs="+", help="numbers of levels to decode; default: each")
    parser.add_argument("--recogniser", type=Path, help="JSGF grammar or folder of a Whisper; default: the corpus's")


def run(args: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    codec = load_codec(args.codec, CODECS).to(args.device)
    clips = load_clips(args.corpus, args.split, args.clips, codec.sample_rate)
    rate, texts, true = codec.sample_rate, [clip.text for clip in clips], [clip.wave for clip in clips]
    grammar = args.corpus / "grammar.jsgf"
    recogniser = args.recogniser or (grammar if grammar.is_file() else None)
    protocols, encoder = words_by(recogniser), GE2EEncoder()
    voices = np.stack([encoder.embed(wave, rate) for wave in true])  # (clips, 256), unit length
    heard = np.array([prosody(wave, rate) for wave in true])  # (clips, 2)
    codes = [encode(codec, wave, args.device) for wave in true]
    rows = []
    for levels in args.levels or range(1, codec.levels + 1):
        waves = [decode(codec, code[:levels]) for code in track(codes, len(codes), "clips")]
        figures = figures_of([measure_clips(WORDS, texts, waves, true, rate, protocols, device=str(args.device))])
        vectors = np.stack([encoder.embed(wave, rate) for wave in waves])
        figures["voice_similarity"] = float(np.mean(np.sum(vectors * voices, 1)))
        made = np.array([prosody(wave, rate) for wave in waves])
        for column, figure in enumerate(("pitch_range_correlation", "energy_correlation")):
            figures[figure] = correlation(heard[:, column], made[:, column])
        rows.append({"levels": levels, **{key: round(value, 4) for key, value in figures.items()}})
        yield rows[-1], ", ".join(f"{key} {value:g}" for key, value in rows[-1].items())
    path = dated(args.out, f"levels-{args.device.type}.png")
    chart(rows, path)
    yield {"chart": path.name}, str(path)


@torch.inference_mode()
def encode(codec: Codec, wave: np.ndarray, device: torch.device) -> torch.Tensor:
    """(N,) -> codes (K, L)."""
    return codec.encode(torch.from_numpy(wave)[None, None].to(device))[0]


@torch.inference_mode()
def decode(codec: Codec, codes: torch.Tensor) -> np.ndarray:
    """Codes of the first levels (k, L) -> (N,)."""
    return codec.decode(codes[None])[0, 0].float().cpu().numpy()


def chart(rows: list[dict], path: Path) -> None:
    """Scores against the number of levels, each between 0 and 1."""
    lines = {
        "words understood (closed sentences)": [1 - row["wer"] if "wer" in row else None for row in rows],
        "words understood (free sentences)": [1 - row["wer_free"] if "wer_free" in row else None for row in rows],
        "voice: cosine of GE2E vectors": [row["voice_similarity"] for row in rows],
        "pitch range: correlation": [row["pitch_range_correlation"] for row in rows],
        "energy: correlation": [row["energy_correlation"] for row in rows],
    }
    with chart_file(path, figsize=(7, 4)) as (_, axes):
        for (label, values), style in zip(lines.items(), ("o-", "o--", "s-", "^-", "^--")):
            if None not in values:
                axes.plot([row["levels"] for row in rows], np.maximum(values, 0), style, label=label)
        axes.set(xlabel="levels of codes decoded", ylabel="score (1: as the true clip)", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend()
