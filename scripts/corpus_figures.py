"""Measure a release on held-out clips of the synthetic corpus:

    python scripts/evaluate.py hicodit|talker_t2av|rvq_codec|whisperx_vae|lia_x [--weights RELEASE] [--clips N] ...

hicodit: speech from silent videos (word errors, voices, expression). talker_t2av: speech and talking faces from texts
(word errors, endings, synchrony, streaming, batches). rvq_codec, whisperx_vae: resynthesised speech (word errors, PESQ,
STOI, use of the codes or statistics of the latents). lia_x: clips reconstructed from their first frame and motion codes
(PSNR, SSIM, movement, speed). docs/results.md explains the figures.

Prints the figures and writes them to OUT/DATE-NAME.json, where NAME is the name of the release folder. Word errors need
the extra `eval`; without it, codecs are measured without word errors. `python scripts/evaluate.py MODEL --help` lists
all options.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
from omegaconf import OmegaConf

from corpora.synthetic.mouth_opening import MouthReader
from engine.config import CONFIGS
from engine.errors import UserError, run_cli
from engine.files import atomic_output
from engine.record import RESULTS, write_record
from engine.settings import PRECISIONS, override
from engine.shards.recordings import load_clips

Figures = Iterator[tuple[str, dict[str, Any]]]


def hicodit(args: argparse.Namespace) -> Figures:
    """Speech from silent videos of held-out clips: word errors, voices, expression."""
    from hicodit.evaluation import evaluate_corpus
    from hicodit.held_out import mean_voices
    from hicodit.pipeline import HiCoDiTPipeline
    from hicodit.settings import with_preset

    pipeline = HiCoDiTPipeline.from_pretrained(args.weights, codec=args.codec, precision=args.precision)
    sampler, pipeline.guidance = with_preset(args.sampler, pipeline.sampler, pipeline.guidance)
    changes = {"steps": args.steps, "method": args.method, "temperature": args.temperature}
    pipeline.sampler = override(sampler, changes)
    if args.guidance:
        scales = dict(zip(("all", "identity", "expression", "lip"), args.guidance))
        pipeline.guidance = override(pipeline.guidance, scales)
    yield "sampler", asdict(pipeline.sampler)
    yield "guidance", asdict(pipeline.guidance)
    shards = args.shards or args.corpus / "shards" / "hicodit_tiny" / "train"
    for split in args.splits:
        known = mean_voices(shards) if split == "seen" and not args.words_only else None
        sizes = args.clips, args.expression_clips, args.batch, args.seed
        yield split, evaluate_corpus(pipeline, args.corpus, split, *sizes, known, args.words_only)


def talker_t2av(args: argparse.Namespace) -> Figures:
    """Speech and talking faces from held-out texts: word errors, endings, synchrony, streaming, batches."""
    from talker_t2av.evaluation import HeldOut, evaluate_corpus
    from talker_t2av.pipeline import TalkerPipeline

    if args.figure and "t2av" not in args.parts:
        raise UserError("--figure shows a clip of the part t2av: add it to --parts")
    codecs = {name: vars(args)[name] for name in ("speech", "motion", "speaker") if vars(args)[name]}
    pipeline = TalkerPipeline.from_pretrained(args.weights, codecs=codecs, precision=args.precision)
    changes = {name: vars(args)[name] for name in ("steps", "temperature", "guidance", "particles")}
    pipeline.sampling = override(pipeline.sampling, changes)
    yield "sampling", asdict(pipeline.sampling)
    for split in args.splits:
        clips = HeldOut(args.corpus, split, args.clips, MouthReader())
        yield split, evaluate_corpus(pipeline, clips, args.parts, args.batch, args.seed, args.figure)


def rvq_codec(args: argparse.Namespace) -> Figures:
    """Held-out speech coded and decoded: word errors, PESQ, STOI, use of the codes."""
    from rvq_codec import RVQCodec
    from rvq_codec.evaluation import evaluate

    codec = RVQCodec.from_pretrained(args.weights)
    for split in args.splits:
        clips = load_clips(args.corpus, split, args.clips, codec.sample_rate)
        yield split, evaluate(codec, clips, args.levels, args.corpus / "grammar.jsgf")


def whisperx_vae(args: argparse.Namespace) -> Figures:
    """Held-out speech coded and decoded: word errors, PESQ, STOI, statistics of the latents."""
    from whisperx_vae import WhisperXVAE
    from whisperx_vae.evaluation import evaluate

    codec = WhisperXVAE.from_pretrained(args.weights)
    for split in args.splits:
        clips = load_clips(args.corpus, split, args.clips, codec.sample_rate)
        yield split, evaluate(codec, clips, args.corpus / "grammar.jsgf")


def lia_x(args: argparse.Namespace) -> Figures:
    """Held-out clips rebuilt from their first frame and motion codes: PSNR, SSIM, movement, speed."""
    from lia_x import LiaX
    from lia_x.evaluation import measure, measure_speed, mouth_correlation, rebuild_clips, strip

    codec, reader, shown = LiaX.from_pretrained(args.weights), MouthReader(), []
    regions = OmegaConf.load(CONFIGS / "experiment" / "lia_x_synthetic.yaml").task.validation.regions
    for split in args.splits:
        clips = list(rebuild_clips(codec, args.corpus, split, args.clips).values())
        yield split, measure(clips, regions) | {"mouth_opening_correlation": mouth_correlation(clips, reader)}
        shown += clips[:3]
    yield "frames_a_second", measure_speed(codec, shown[0], args.chunk)
    with atomic_output(args.strip or args.out / f"{args.weights.resolve().name}.jpg") as partial:
        cv2.imwrite(str(partial), cv2.cvtColor(strip(shown), cv2.COLOR_RGB2BGR))


MODELS = {
    "hicodit": (hicodit, "hicodit_tiny", 200),
    "talker_t2av": (talker_t2av, "talker_t2av_tiny", 100),
    "rvq_codec": (rvq_codec, "rvq_tiny", 100),
    "whisperx_vae": (whisperx_vae, "whisperx_vae_tiny", 100),
    "lia_x": (lia_x, "lia_x_tiny", 24),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_subparsers(dest="model", required=True, metavar="MODEL")
    commands = {}
    for name, (measure, weights, clips) in MODELS.items():
        form = argparse.ArgumentDefaultsHelpFormatter
        add = models.add_parser(name, description=measure.__doc__, formatter_class=form).add_argument
        commands[name] = add
        add("--weights", type=Path, default=Path("assets") / weights, help="release folder")
        add("--corpus", type=Path, default=Path("data/synthetic"), help="folder of the corpus")
        splits = ["seen"] if name == "talker_t2av" else ["seen", "unseen"]
        add(
            "--splits",
            nargs="+",
            default=splits,
            help="seen: voices of the training set; unseen: other voices; no sentence is in the training set",
        )
        add("--clips", type=int, default=clips, help="number of clips of each split")
        add("--out", type=Path, default=RESULTS, help="folder of the JSON record")
    for name in ("hicodit", "talker_t2av"):
        add = commands[name]
        add("--batch", type=int, default=16, help="batch size")
        add("--seed", type=int, default=0, help="clip i is generated with seed + i")
        add("--steps", type=int, help="sampling steps (None: the release's setting)")
        add("--precision", choices=PRECISIONS, default="fp32", help="of the model")
        add("--temperature", type=float, help="sampling temperature (None: the release's setting)")
    add = commands["hicodit"]
    presets = sorted(path.stem for path in (CONFIGS / "sampler").glob("*.yaml"))
    add("--sampler", choices=presets, default="release", help="file of configs/sampler; options below override it")
    add("--method", help="sampling method (None: the release's setting)")
    add("--guidance", nargs=4, type=float, metavar=("ALL", "IDENTITY", "EXPRESSION", "LIP"), help="guidance scales")
    add("--codec", type=Path, help="release folder of the tokenizer (None: the release's own)")
    add("--shards", type=Path, help="training shards with the seen voices (None: CORPUS/shards/hicodit_tiny/train)")
    add("--expression-clips", type=int, default=60, help="number of clips for the measures of prosody")
    add("--words-only", action="store_true", help="measure word error rates only")
    add = commands["talker_t2av"]
    add("--guidance", type=float, help="guidance scale (None: the release's setting)")
    add("--particles", type=int, help="drafts of v2a (None: the release's setting)")
    for codec in ("speech", "motion", "speaker"):
        add(f"--{codec}", type=Path, help=f"release folder of the {codec} codec (None: the release's own)")
    parts = ["t2av", "tts", "v2a", "a2v", "stream", "batch"]
    add("--parts", nargs="+", choices=parts, default=parts, help="what is measured")
    add("--figure", type=Path, help="write a figure of the first t2av clip to this PNG file")
    commands["rvq_codec"]("--levels", type=int, nargs="+", default=[1, 2, 4, 12], help="numbers of levels to decode")
    commands["lia_x"]("--chunk", type=int, default=16, help="frames per batch in the measurement of speed")
    commands["lia_x"](
        "--strip", type=Path, help="write true frames above reconstructed ones to this file (None: OUT/NAME.jpg)"
    )
    args = parser.parse_args()
    least = 2 if args.model in ("hicodit", "talker_t2av") else 1
    if args.clips < least or vars(args).get("batch", 1) < 1:
        raise UserError(f"--clips {args.clips} must be at least {least}, and --batch at least 1")
    return args


def lines(figures: dict[str, Any], indent: str = "  ") -> Iterator[str]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield f"{indent}{name}"
            yield from lines(value, indent + "  ")
        else:
            values = value if isinstance(value, list) else [value]
            shown = " ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)
            yield f"{indent}{name:43} {shown}"


def main() -> None:
    args, results = parse(), {}
    for part, figures in MODELS[args.model][0](args):
        results[part] = figures
        print(part, *lines(figures), sep="\n", flush=True)
    what = f"{args.model} on held-out clips of the synthetic corpus"
    print(f"written to {write_record(args.out, args.weights.resolve().name, what, results, arguments=vars(args))}")


if __name__ == "__main__":
    run_cli(main)
