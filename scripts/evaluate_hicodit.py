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
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.record import write_record
from engine.errors import UserError, run_cli
from engine.media.audio import read_audio
from engine.media.corpus import read_manifest
from engine.metrics.recogniser import Recogniser, word_error_rate
from engine.metrics.speaker import GE2EEncoder
from engine.metrics.speech import pitch
from hicodit.conditions import EXPRESSIONS
from hicodit.evaluation import synthesise
from hicodit.pipeline import HiCoDiTPipeline

RATE = 24_000


class Measures:
    """Recogniser, speaker encoder and prosody on waves at `RATE` Hz."""

    def __init__(self, corpus: Path) -> None:
        self.recogniser, self.speaker = Recogniser(corpus / "grammar.jsgf"), GE2EEncoder()

    def words(self, waves: list[np.ndarray]) -> list[str]:
        return [self.recogniser.transcribe(w, RATE) for w in waves]

    def voices(self, waves: list[np.ndarray]) -> np.ndarray:
        return np.stack([self.speaker.embed(w, RATE) for w in waves])

    @staticmethod
    def prosody(waves: list[np.ndarray]) -> np.ndarray:
        """(clips, 2): pitch range in semitones between the 10th and 90th percentile, mean power in dB."""
        rows = []
        for wave in waves:
            f0 = pitch(wave, RATE)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("data/synthetic"))
    parser.add_argument("--weights", type=Path, default=Path("assets/hicodit_tiny"))
    parser.add_argument("--codec", type=Path, default=None, help="tokenizer (default: the one beside the weights)")
    parser.add_argument("--clips", type=int, default=200, help="clips of each split (default: %(default)s)")
    parser.add_argument("--expression-clips", type=int, default=60, help="clips whose prosody is measured")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--splits", nargs="+", default=["seen", "unseen"])
    parser.add_argument("--steps", type=int, help="sampling steps (default: the release's)")
    parser.add_argument("--method", help="sampler (default: the release's)")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--guidance", nargs=4, type=float, metavar=("ALL", "IDENTITY", "EXPRESSION", "LIP"))
    parser.add_argument("--words-only", action="store_true", help="word error rates only")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
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
        speech = synthesise(pipeline, crops, args.seed, args.batch)
        waves, shown = [said.wave for said in speech], [said.expression for said in speech]
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
            known = training_voices(args.corpus) if split == "seen" else None
            r |= identity(measures, truth, waves, resynthesis, [c["voice"] for c in clips], known)
            labels = [c["expression"] for c in clips]
            r["expression_recognised"] = float(
                np.mean([np.bincount(s).argmax() == EXPRESSIONS.index(label) for s, label in zip(shown, labels)])
            )
            few = min(args.expression_clips, len(clips))  # finding the pitch takes as long as the clip lasts
            other = derangement(few, rng)  # whose expressions each clip is given
            swapped = synthesise(pipeline, crops[:few], args.seed, args.batch, [shown[i] for i in other])
            true_prosody, own = measures.prosody(truth[:few]), measures.prosody(waves[:few])
            coded = measures.prosody(resynthesis[:few])
            given = measures.prosody([said.wave for said in swapped])
            for column, name in enumerate(("pitch_range", "energy")):
                true = true_prosody[:, column]
                r[f"{name}_correlation_resynthesis"] = correlation(true, coded[:, column])
                r[f"{name}_correlation"] = correlation(true, own[:, column])
                r[f"{name}_correlation_expressions_shuffled"] = correlation(true, given[:, column])
                r[f"{name}_correlation_to_the_expression_shown"] = correlation(true[other], given[:, column])
        r["seconds"] = time.monotonic() - start
        results[split] = r
        print(split, json.dumps(r, indent=1), flush=True)
    print(
        write_record(
            args.out,
            "hicodit",
            "HiCoDiT on held-out splits, video only",
            {"processor": platform.machine(), "threads": torch.get_num_threads()},
            results,
            arguments={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            sampler=asdict(pipeline.sampler),
            guidance=asdict(pipeline.guidance),
        )
    )


def training_voices(corpus: Path) -> dict[int, np.ndarray]:
    """Mean GE2E vector (256,) of every voice over the training clips, from the prepared features."""
    sums: dict[int, list[np.ndarray]] = {}
    for path in sorted((corpus / "features" / "train").glob("visual-*.safetensors")):
        clips = json.loads(path.with_suffix(".json").read_text())["clips"]
        for clip, vector in zip(clips, load_file(path)["ge2e"].numpy()):
            sums.setdefault(clip["voice"], []).append(vector)
    if not sums:
        raise UserError(f"no training features in {corpus}: run python scripts/prepare_features.py")
    return {voice: np.mean(vectors, 0) for voice, vectors in sums.items()}


def identity(
    measures: Measures,
    truth: list[np.ndarray],
    waves: list[np.ndarray],
    resynthesis: list[np.ndarray],
    voices: list[int],
    known: dict[int, np.ndarray] | None,
) -> dict[str, float]:
    """How often the output's GE2E vector is nearest to its own voice's mean among all voices.

    The means are those of `known` voices, or else of the true clips of the split, each clip left out of its own mean;
    then only clips whose voice has another clip count, and nothing is said where there are none.
    """
    true = measures.voices(truth)
    labels = np.array(voices)
    names = sorted(known) if known else sorted(set(voices))
    sums = np.stack([known[n] for n in names]) if known else np.stack([true[labels == n].sum(0) for n in names])
    target = np.array([names.index(v) for v in voices])
    counted = np.array([known is not None or voices.count(v) > 1 for v in voices])
    if not counted.any():
        return {}

    def scores(vectors: np.ndarray) -> np.ndarray:
        """Cosines (clips, voices)."""
        out = np.empty((len(vectors), len(names)))
        for i, vector in enumerate(vectors):
            means = sums.copy()
            if not known:
                means[target[i]] -= true[i]
            means /= np.linalg.norm(means, axis=1, keepdims=True) + 1e-9
            out[i] = means @ vector
        return out

    result: dict[str, float] = {"voices": len(names)}
    compared = {"": measures.voices(waves), "_clean": true, "_resynthesis": measures.voices(resynthesis)}
    for name, vectors in compared.items():
        cosines = scores(vectors)
        own = cosines[np.arange(len(target)), target]
        result[f"voice_first{name}"] = float(np.mean((cosines.argmax(1) == target)[counted]))
        result[f"voice_similarity{name}"] = float(np.mean(own[counted]))
    return result


if __name__ == "__main__":
    run_cli(main)
