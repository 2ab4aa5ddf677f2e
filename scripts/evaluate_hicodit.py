"""Measure a HiCoDiT release on the held-out splits of the synthetic corpus.

    python scripts/evaluate_hicodit.py --corpus data/synthetic --weights assets/hicodit_tiny --clips 200

From each clip's MP4 alone it makes speech, and reports for `seen` (known voices, new sentences) and `unseen` (new
voices, new sentences): word error rate of clean speech, of the tokenizer's resynthesis, of the model, and of the model
with the videos shuffled between clips (what is left when the lips say nothing about the words); how often the output's
GE2E vector is nearest to the true voice; correlation of pitch range and energy with the true clips, as it is and with
the expressions shuffled. Writes DATE-hicodit.json to --out.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.errors import UserError, run_cli
from engine.media.audio import read_audio
from engine.metrics.recogniser import Recogniser, word_error_rate
from engine.metrics.speaker import SpeakerEncoder
from engine.metrics.speech import f0_and_energy
from hicodit.features import read_manifest
from hicodit.pipeline import Crops, HiCoDiTPipeline, generate

RATE = 24_000


class Measures:
    """Recogniser, speaker encoder and prosody on waves at `RATE` Hz."""

    def __init__(self, corpus: Path) -> None:
        self.recogniser, self.speaker = Recogniser(corpus / "grammar.jsgf"), SpeakerEncoder()

    def words(self, waves: list[np.ndarray]) -> list[str]:
        return [self.recogniser.transcribe(w, RATE) for w in waves]

    def voices(self, waves: list[np.ndarray]) -> np.ndarray:
        return np.stack([self.speaker.embed(w, RATE) for w in waves])

    @staticmethod
    def prosody(waves: list[np.ndarray]) -> np.ndarray:
        """(clips, 2): pitch range in semitones between the 10th and 90th percentile, loudness of speech in dB."""
        rows = []
        for wave in waves:
            f0, _ = f0_and_energy(wave, RATE)
            voiced = f0[f0 > 0]
            spread = 12 * np.log2(np.percentile(voiced, 90) / np.percentile(voiced, 10)) if len(voiced) > 4 else 0.0
            rows.append((spread, 10 * np.log10(np.mean(np.square(wave)) + 1e-10)))
        return np.array(rows)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def derangement(size: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation that leaves nothing in place: a shuffled order, turned by one."""
    order = rng.permutation(size)
    out = np.empty(size, int)
    out[order] = np.roll(order, 1)
    return out


def synthesise(
    pipeline: HiCoDiTPipeline, crops: list[Crops], batch: int, expressions: list[np.ndarray] | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Waves and shown expressions of clips; `expressions` (each (J,)) replaces what the faces show."""
    order = sorted(range(len(crops)), key=lambda i: len(crops[i].mouth))
    waves: dict[int, np.ndarray] = {}
    shown: dict[int, np.ndarray] = {}
    for start in tqdm(range(0, len(order), batch), unit="batch", mininterval=5):
        group = order[start : start + batch]
        conditions = pipeline.conditions([crops[i] for i in group])
        if expressions is not None:
            windows = conditions.expression.shape[1]
            other = np.stack([np.resize(expressions[i], windows) for i in group])
            conditions = replace(conditions, expression=torch.from_numpy(other).to(conditions.expression))
        tokens = generate(pipeline.system.model, conditions, pipeline.sampler, pipeline.guidance, group)
        waves |= zip(group, pipeline.speak(tokens))
        shown |= zip(group, conditions.expression.cpu().numpy())
    return [waves[i] for i in range(len(crops))], [shown[i] for i in range(len(crops))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("data/synthetic"))
    parser.add_argument("--weights", type=Path, default=Path("assets/hicodit_tiny"))
    parser.add_argument("--codec", type=Path, default=None, help="tokenizer (default: the one beside the weights)")
    parser.add_argument("--clips", type=int, default=200, help="clips of each split (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--splits", nargs="+", default=["seen", "unseen"])
    parser.add_argument("--steps", type=int, help="sampling steps (default: the release's)")
    parser.add_argument("--method", help="sampler (default: the release's)")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--guidance", nargs=4, type=float, metavar=("ALL", "IDENTITY", "EXPRESSION", "LIP"))
    parser.add_argument("--words-only", action="store_true", help="word error rates only")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    if args.clips < 2 or args.batch < 1:
        raise UserError("--clips must be at least 2 and --batch at least 1")
    pipeline = HiCoDiTPipeline.from_pretrained(args.weights, codec=args.codec)
    given = {"steps": args.steps, "method": args.method, "temperature": args.temperature}
    pipeline.sampler = replace(pipeline.sampler, **{k: v for k, v in given.items() if v is not None})
    if args.guidance:
        scales = dict(zip(("all", "identity", "expression", "lip"), args.guidance))
        pipeline.guidance = replace(pipeline.guidance, **scales)
    measures, results = Measures(args.corpus), {}
    for split in args.splits:
        start = time.monotonic()
        manifest = read_manifest(args.corpus, split)
        picks = np.linspace(0, len(manifest) - 1, min(args.clips, len(manifest))).round().astype(int)
        clips, crops, lost = [], [], []
        for i in picks:
            try:
                crops.append(pipeline.crops(args.corpus / split / f"{manifest[i]['id']}.mp4"))
                clips.append(manifest[i])
            except UserError as error:
                lost.append(str(error))
        truth = [read_audio(args.corpus / split / f"{c['id']}.wav", RATE) for c in clips]
        text = [c["text"] for c in clips]
        waves, shown = synthesise(pipeline, crops, args.batch)
        heard = measures.words(waves)
        rng = np.random.default_rng(0)
        shuffled = derangement(len(clips), rng)
        r = {
            "clips": len(clips),
            "clips_without_face": len(lost),
            "wer": word_error_rate(text, heard),
            "wer_shuffled_videos": word_error_rate(text, [heard[i] for i in shuffled]),
        }
        if not args.words_only:
            with torch.inference_mode():
                resynthesis = [
                    pipeline.codec.decode(pipeline.codec.encode(torch.from_numpy(w)[None, None]))[0, 0].numpy()
                    for w in truth
                ]
            r["wer_clean"] = word_error_rate(text, measures.words(truth))
            r["wer_resynthesis"] = word_error_rate(text, measures.words(resynthesis))
            r |= identity(measures, truth, waves, resynthesis, [c["voice"] for c in clips])
            labels = [c["expression"] for c in clips]
            r["expression_recognised"] = float(
                np.mean([np.bincount(s).argmax() == _index(label) for s, label in zip(shown, labels)])
            )
            true_prosody, own = measures.prosody(truth), measures.prosody(waves)
            swapped, _ = synthesise(pipeline, crops, args.batch, [shown[i] for i in shuffled])
            other = measures.prosody(swapped)
            for column, name in enumerate(("pitch_range", "energy")):
                r[f"{name}_correlation"] = correlation(true_prosody[:, column], own[:, column])
                r[f"{name}_correlation_shuffled"] = correlation(true_prosody[:, column], other[:, column])
                r[f"{name}_follows_shuffled"] = correlation(true_prosody[shuffled, column], other[:, column])
        r["seconds"] = time.monotonic() - start
        results[split] = r
        print(split, json.dumps(r, indent=1), flush=True)
    record = {
        "date": date.today().isoformat(),
        "what": "HiCoDiT on held-out splits, video only",
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "sampler": asdict(pipeline.sampler),
        "guidance": asdict(pipeline.guidance),
        "hardware": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "results": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{date.today().isoformat()}-hicodit.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


def _index(label: str) -> int:
    from hicodit.conditions import EXPRESSIONS

    return EXPRESSIONS.index(label)


def identity(
    measures: Measures,
    truth: list[np.ndarray],
    waves: list[np.ndarray],
    resynthesis: list[np.ndarray],
    voices: list[int],
) -> dict[str, float]:
    """How often the output is nearest to its own voice's mean GE2E vector, among all voices of the split."""
    true, own = measures.voices(truth), measures.voices(waves)
    names = sorted(set(voices))
    means = np.stack([true[[v == name for v in voices]].mean(0) for name in names])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    target = np.array([names.index(v) for v in voices])
    return {
        "voices": len(names),
        "voice_first": float(np.mean((own @ means.T).argmax(1) == target)),
        "voice_first_clean": float(np.mean((true @ means.T).argmax(1) == target)),
        "voice_first_resynthesis": float(np.mean((measures.voices(resynthesis) @ means.T).argmax(1) == target)),
        "voice_similarity": float(np.mean(np.sum(own * means[target], 1))),
    }


if __name__ == "__main__":
    run_cli(main)
