"""Measure a Talker-T2AV release on held-out sentences of the synthetic corpus.

    python scripts/evaluate_talker.py --corpus data/synthetic --weights assets/talker_t2av_tiny --clips 100

Every sentence is said with the voice and the face of another clip of the same speaker. Reported are

- t2av, tts: word error rate, beside clean speech and the codec's resynthesis of it, and with the texts shuffled; the
  stop head: seconds from the end of speech (the last 10 ms within 30 dB of the loudest; no recogniser is asked) to the
  end of the wave. An utterance is in time when that is at most 0.3 s, cut when it is under 0.02 s (true clips: 0.12 s
  and more), endless when the limit ended it;
- t2av, a2v, v2a: synchrony, the correlation of mouth opening (read from the pictures) with loudness, as it is and with
  the sound moved by 200 ms, beside that of the true clips and of true motion drawn by the motion codec (and the
  correlation of what is read with the opening that was drawn);
- stream: patches drawn before the first sound; the largest difference between the joined chunks and the whole;
- batch: the largest difference of latents between a batch of 8 and singles (and its median over clips, and that of
  the first patch: rounding errors are fed back and grow from patch to patch), and the speed of both.

Prints a table and writes DATE-talker_t2av.json to --out; --figure also writes a picture of the first t2av clip.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import write_record
from corpora.synthetic.mouth_opening import MouthReader
from engine.errors import UserError, run_cli
from engine.media.audio import read_audio
from engine.media.corpus import read_manifest
from engine.media.pictures import identity_to_tensor, to_bytes, video_to_tensor
from engine.media.video import read_video
from engine.metrics.recogniser import Recogniser, word_error_rate
from engine.metrics.resynthesis import fit_length
from engine.progress import track
from talker_t2av.evaluation import speech_end, synchrony
from talker_t2av.figure import draw
from talker_t2av.generation import generate
from talker_t2av.jobs import prepare_job
from talker_t2av.model import FPS
from talker_t2av.pipeline import Job, Talk, TalkerPipeline

PARTS = ("t2av", "tts", "v2a", "a2v", "stream", "batch")
SHIFT = 5  # frames: 200 ms
LATE, CUT = 0.3, 0.02  # seconds of quiet at the end
STREAMED = 4  # clips


class HeldOut:
    """Clips of a split, evenly picked, each with another clip of its speaker as the reference."""

    def __init__(self, corpus: Path, split: str, clips: int) -> None:
        rows = read_manifest(corpus, split)
        picks = np.linspace(0, len(rows) - 1, min(clips, len(rows))).round().astype(int)
        self.corpus, self.rows = corpus, [rows[i] for i in picks]
        known = read_manifest(corpus, "train") + rows
        known = [row for row in known if row["expression"] == "neutral"] + known  # neutral ones are better liked
        self.references = [
            next(k for k in known if k["voice"] == row["voice"] and k["text"] != row["text"]) for row in self.rows
        ]
        self.texts = [row["text"] for row in self.rows]

    def path(self, row: dict, suffix: str) -> str:
        return str(self.corpus / row["split"] / f"{row['id']}{suffix}")

    def wave(self, row: dict) -> np.ndarray:
        return read_audio(self.path(row, ".wav"), TalkerPipeline.rate)

    def frames(self, row: dict) -> np.ndarray:
        return read_video(self.path(row, ".mp4"), FPS)

    def jobs(self, mode: str, seed: int) -> list[Job]:
        """What the model is asked for each clip; clip i is drawn with seed + i."""
        out = []
        for i, (row, reference) in enumerate(zip(self.rows, self.references)):
            job = Job("tts", row["text"], reference_audio=self.path(reference, ".wav"), seed=seed + i)
            if mode in ("t2av", "a2v"):
                job = replace(job, reference_video=self.path(reference, ".mp4"))
            if mode == "a2v":
                job = replace(job, audio=self.path(row, ".wav"), reference_audio=None)
            if mode == "v2a":
                job = replace(job, video=self.path(row, ".mp4"))
            out.append(replace(job, mode=mode))
        return out


class Measures:
    """Recogniser and mouth reader, each made when it is first needed."""

    def __init__(self, corpus: Path) -> None:
        self.recogniser, self.opening = Recogniser(corpus / "grammar.jsgf"), MouthReader()

    def words(self, waves: Sequence[np.ndarray]) -> list[str]:
        return [self.recogniser.transcribe(wave, TalkerPipeline.rate) for wave in waves]

    def word_errors(self, texts: Sequence[str], waves: Sequence[np.ndarray]) -> dict[str, float]:
        """Word error rate, and the same with each text held against the next clip's words."""
        heard = self.words(waves)
        return {
            "wer": word_error_rate(texts, heard),
            "wer_texts_shuffled": word_error_rate(texts, heard[1:] + heard[:1]),
        }

    def synchrony(self, frames: Sequence[np.ndarray], waves: Sequence[np.ndarray], name: str) -> dict[str, float]:
        """Mean over clips, in time and with the sound 200 ms late and early."""
        openings = [self.opening(f) for f in frames]
        out = {}
        for suffix, shift in (("", 0), ("_200ms_late", SHIFT), ("_200ms_early", -SHIFT)):
            scores = [synchrony(o, w, TalkerPipeline.rate, shift) for o, w in zip(openings, waves)]
            out[f"synchrony_{name}{suffix}"] = float(np.mean(scores))
        return out


def endings(talks: Sequence[Talk]) -> dict[str, float]:
    """How utterances end; see the module's text."""
    quiet = np.array([len(t.wave) / TalkerPipeline.rate - speech_end(t.wave, TalkerPipeline.rate) for t in talks])
    stopped = np.array([t.stopped for t in talks])
    return {
        "ends_in_time": float(np.mean(stopped & (quiet <= LATE) & (quiet >= CUT))),
        "ends_late": float(np.mean(quiet > LATE)),
        "ends_cut": float(np.mean(quiet < CUT)),
        "endless": float(np.mean(~stopped)),
        "quiet_at_end_median_s": float(np.median(quiet)),
        "quiet_at_end_95_percent_s": float(np.percentile(quiet, 95)),
    }


def talk(pipeline: TalkerPipeline, jobs: Sequence[Job], batch: int) -> list[Talk]:
    """All jobs, those with texts of like length together."""
    order = sorted(range(len(jobs)), key=lambda i: len(jobs[i].text))
    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    talks: dict[int, Talk] = {}
    for group in track(groups, len(groups), f"{jobs[0].mode} batches"):
        talks |= zip(group, pipeline.run([jobs[i] for i in group]))
    return [talks[i] for i in range(len(jobs))]


@torch.inference_mode()
def floors(pipeline: TalkerPipeline, clips: HeldOut, measures: Measures) -> dict[str, float]:
    """Of the true clips, and of what the codecs leave of them."""
    codec, motion = pipeline.system.speech, pipeline.system.motion
    waves, pictures = [clips.wave(row) for row in clips.rows], [clips.frames(row) for row in clips.rows]
    decoded = [codec.decode(codec.encode(torch.from_numpy(w)[None, None]))[0, 0].numpy() for w in waves]
    decoded = [fit_length(d, len(w)) for d, w in zip(decoded, waves)]
    drawn = []
    for frames, reference in zip(pictures, clips.references):
        face = identity_to_tensor(clips.frames(reference)[0], motion.size)
        drawn.append(
            to_bytes(motion.decode(motion.encode(video_to_tensor(frames, motion.size)), motion.identity(face)))
        )
    readings = [np.corrcoef(measures.opening(f), row["mouth"]["open"])[0, 1] for f, row in zip(pictures, clips.rows)]
    return {
        "mouth_reader_against_drawn": float(np.mean(readings)),
        "wer_clean": word_error_rate(clips.texts, measures.words(waves)),
        "wer_resynthesis": word_error_rate(clips.texts, measures.words(decoded)),
        **measures.synchrony(pictures, waves, "true_pairs"),
        **measures.synchrony(drawn, waves, "true_motion_drawn"),
    }


def measure_stream(pipeline: TalkerPipeline, jobs: Sequence[Job]) -> dict[str, float]:
    """Streaming against the offline result."""
    drawn = []
    patches, seconds, sound, picture = [], [], [], []
    for job in jobs:
        drawn.clear()
        start, waves, frames = time.perf_counter(), [], []
        for chunk in pipeline.stream(job, drawn.append):
            if len(chunk.wave) and not waves:
                patches.append(len(drawn))
                seconds.append(time.perf_counter() - start)
            if len(chunk.wave):
                waves.append(chunk.wave)
            if chunk.frames is not None:
                frames.append(chunk.frames)
        whole = pipeline.run([job])[0]
        joined = np.concatenate(waves)
        if len(joined) != len(whole.wave):
            raise UserError(f"the chunks of {job.text!r} have {len(joined)} samples, the whole has {len(whole.wave)}")
        sound.append(float(np.abs(joined - whole.wave).max()))
        picture.append(float(np.abs(np.concatenate(frames).astype(int) - whole.frames.astype(int)).max()))
    return {
        "patches_before_sound": max(patches),
        "seconds_before_sound_median": float(np.median(seconds)),
        "join_error_sound": max(sound),
        "join_error_picture_of_255": max(picture),
    }


def measure_batch(pipeline: TalkerPipeline, jobs: Sequence[Job]) -> dict[str, float]:
    """Eight clips one by one and as one batch: latents and speed of the loop, without codecs."""
    prepared = [prepare_job(job, pipeline.system) for job in jobs]
    requests, mode = [p.request for p in prepared], prepared[0].mode
    generate(pipeline.system.model, requests[:1], mode, pipeline.sampling)  # the first call pays for set-up

    def timed(groups: list[list]) -> tuple[list, float]:
        start = time.perf_counter()
        results = [r for group in groups for r in generate(pipeline.system.model, group, mode, pipeline.sampling)]
        return results, time.perf_counter() - start

    singles, slow = timed([[request] for request in requests])
    together, fast = timed([requests])
    figures: dict[str, float] = {"clips": len(jobs)}
    size = pipeline.system.model.config.patch_size
    for stream in ("speech", "motion"):
        pairs = [(getattr(a, stream), getattr(b, stream)) for a, b in zip(singles, together)]
        worst = [float((a - b).abs().max()) if a.shape == b.shape else float("inf") for a, b in pairs]
        first = [float((a[:size] - b[:size]).abs().max()) for a, b in pairs]  # before rounding errors are fed back
        figures |= {
            f"difference_{stream}": max(worst),
            f"difference_{stream}_median": float(np.median(worst)),
            f"difference_{stream}_first_patch": max(first),
        }
    return figures | {
        "seconds_of_speech_a_second_singles": sum(len(r.speech) for r in singles) / FPS / slow,
        "seconds_of_speech_a_second_batch": sum(len(r.speech) for r in together) / FPS / fast,
        "speed_ratio": slow / fast,
    }


def evaluate(
    pipeline: TalkerPipeline,
    clips: HeldOut,
    measures: Measures,
    parts: Sequence[str],
    batch: int,
    seed: int,
    figure: Path | None,
) -> dict[str, dict[str, float]]:
    """The figures, by part."""
    results = {"true": floors(pipeline, clips, measures)}
    rows = clips.rows
    if "t2av" in parts:
        talks = talk(pipeline, clips.jobs("t2av", seed), batch)
        waves = [t.wave for t in talks]
        sync = measures.synchrony([t.frames for t in talks], waves, "generated")
        results["t2av"] = measures.word_errors(clips.texts, waves) | endings(talks) | sync
        if figure is not None:
            draw(talks[0], clips.texts[0], measures.opening(talks[0].frames), figure)
    if "tts" in parts:
        talks = talk(pipeline, clips.jobs("tts", seed), batch)
        results["tts"] = measures.word_errors(clips.texts, [t.wave for t in talks]) | endings(talks)
    if "v2a" in parts:
        waves = [t.wave for t in talk(pipeline, clips.jobs("v2a", seed), batch)]
        sync = measures.synchrony([clips.frames(row) for row in rows], waves, "generated")
        results["v2a"] = measures.word_errors(clips.texts, waves) | sync
    if "a2v" in parts:
        talks = talk(pipeline, clips.jobs("a2v", seed), batch)
        results["a2v"] = measures.synchrony([t.frames for t in talks], [clips.wave(r) for r in rows], "generated")
    if "stream" in parts:
        results["stream"] = measure_stream(pipeline, clips.jobs("t2av", seed)[:STREAMED])
    if "batch" in parts:
        results["batch"] = measure_batch(pipeline, clips.jobs("t2av", seed)[:8])
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    lines = []
    for part, figures in results.items():
        lines += [f"{part:8s}{name:42s}{value:10.4g}" for name, value in figures.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("data/synthetic"), help="default: %(default)s")
    parser.add_argument("--weights", type=Path, default=Path("assets/talker_t2av_tiny"), help="default: %(default)s")
    parser.add_argument("--speech", type=Path, help="speech codec (default: the release's; so --motion, --speaker)")
    parser.add_argument("--motion", type=Path)
    parser.add_argument("--speaker", type=Path)
    parser.add_argument("--split", default="seen", help="default: %(default)s")
    parser.add_argument("--clips", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--batch", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=int, help="of the solver; so --temperature, --guidance (default: the release's)"
    )
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--figure", type=Path, help="PNG of the first t2av clip")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    if args.clips < 2 or args.batch < 1:
        raise UserError(f"--clips {args.clips} must be at least 2 and --batch {args.batch} at least 1")
    if args.figure and "t2av" not in args.parts:
        raise UserError("--figure shows a clip of the part t2av: add it to --parts")
    codecs = {name: vars(args)[name] for name in ("speech", "motion", "speaker") if vars(args)[name]}
    pipeline = TalkerPipeline.from_pretrained(args.weights, codecs=codecs)
    given = {name: vars(args)[name] for name in ("steps", "temperature", "guidance")}
    pipeline.sampling = replace(pipeline.sampling, **{k: v for k, v in given.items() if v is not None})
    clips = HeldOut(args.corpus, args.split, args.clips)
    results = evaluate(pipeline, clips, Measures(args.corpus), args.parts, args.batch, args.seed, args.figure)
    print(table(results))
    path = write_record(
        args.out,
        "talker_t2av",
        "Talker-T2AV on held-out sentences of the synthetic corpus",
        {"processor": platform.machine(), "threads": torch.get_num_threads()},
        results,
        arguments=json.loads(json.dumps(vars(args), default=str)),
        sampling=asdict(pipeline.sampling),
    )
    print(f"written to {path}")


if __name__ == "__main__":
    run_cli(main)
