"""Talker-T2AV before and after experiment=talker_finetune on one cartoon person: WER, speaker similarity, synchrony,
and a figure.

The person is one of the corpus's voices that no bundled weights were trained on, the sentences are of a split that they
were not trained on either. The steps are those of docs/releasing.md, bundled weights stand in for the released ones,
so their own recipe with low-rank updates stands in for experiment=talker_finetune, whose tokenizer is another. Rank,
rate, batch and number of steps are those of that experiment. Choose others on `--split val`. Finished work is skipped.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from benchmarks.common import ROOT, run_program, took
from corpora.synthetic.corpus import RATE, ClipMaker, clip_id, is_done
from corpora.synthetic.sentences import grammar, language_model
from engine.arguments import within
from engine.charts import chart_file
from engine.evaluation.summary import headline
from engine.files import atomic_output, write_json, write_text
from engine.media.audio import read_audio
from engine.media.pictures import spectrogram
from engine.media.video import read_video
from engine.progress import track
from engine.untrusted import read_json

VOICES = 40  # none of them in the training of the bundled weights
SEED = 1  # of the footage; the corpus has 0
BUNDLED = ROOT / "assets" / "talker_t2av_real"
FIGURES = "[wer,wer_free,voice_similarity,synchrony,ends_in_time,length_error]"
FACES = 5  # faces per row of the figure
PREPARE = """source=folder stages.face.use=false stages.crops.use=false stages.phonemes.use=false
stages.expression.use=false stages.ge2e.use=false stages.rvq.use=false stages.motion.crop=centre"""
TRAIN = """experiment=talker_synthetic data.make=null data.held_out=[] data.tasks=[t2av] data.train.phonemes=null
task.guided_layers=[] task.validation=null trainer.warmup=20 trainer.min_lr_ratio=0.01
trainer.ema_decay=0 trainer.by_length=false trainer.batch_size=8 trainer.log_every=20 trainer.checkpoint_every=100"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, default=Path("runs/finetune_stand_in"), help="output folder")
    parser.add_argument("--person", type=within(0, VOICES - 1), default=0, help="which of the held-out voices")
    parser.add_argument("--clips", type=within(8), default=100, help="number of training clips")
    parser.add_argument(
        "--val-clips", type=within(2), default=20, help="number of validation clips, on which settings may be tuned"
    )
    parser.add_argument("--test-clips", type=within(2), default=30, help="number of test clips")
    parser.add_argument("--steps", type=within(1), default=400, help="training steps of 8 clips")
    parser.add_argument("--rank", type=within(1), default=16, help="rank of the LoRA updates")
    parser.add_argument("--lr", type=within(0, kind=float), default=2e-4, help="learning rate")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="split to evaluate")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    footage = args.work / "footage"
    shards = args.work / "shards"
    run = args.work / f"rank_{args.rank}_lr_{args.lr}_steps_{args.steps}"
    begin = time.monotonic()
    seconds = film(footage, args)
    yield took("footage", begin, minutes=round(seconds / 60, 1))
    begin = time.monotonic()
    codecs = {"speech": "whisperx_vae_speech", "motion": "lia_x_real", "speaker": "voice_tiny"}
    codecs = {stream: ROOT / "assets" / name for stream, name in codecs.items()}
    stages = [f"stages.{s}.{'encoder' if s == 'speaker' else 'codec'}={folder}" for s, folder in codecs.items()]
    where = [f"source.root={footage}", f"output={shards}", f"reuse={shards}", f"device={args.device}"]
    run_program(args.threads, "scripts/prepare_data.py", *PREPARE.split(), "splits=[train]", *where, *stages)
    yield took("preparation", begin)
    begin = time.monotonic()
    if not (run / "release").is_dir():
        settings = [f"init={BUNDLED}", f"data.root={shards}", f"data.stats={motion_stats(args.work, shards)}"]
        settings += [f"task.codecs.{stream}={folder}" for stream, folder in codecs.items()]
        settings += [f"lora.rank={args.rank}", f"lora.alpha={args.rank}", f"trainer.lr={args.lr}"]
        settings += [f"trainer.steps={args.steps}", f"trainer.device={args.device}", f"run={run}"]
        run_program(args.threads, "train.py", *TRAIN.split(), *settings)
    yield took("training", begin)
    begin = time.monotonic()
    report = args.work / f"{run.name}_{args.split}"
    systems = f"{{before:{{mode:t2av}},after:{{mode:t2av,weights:{run / 'release'}}},codecs:{{mode:resynthesis}}}}"
    settings = f"""only=[before,after,codecs] clips=null split=[] corpus=null compare=true media=false workers=1
    references={footage / "unseen"} manifest={footage / args.split}.jsonl grammar={footage / "grammar.jsgf"}
    output={report} device={args.device} systems={systems} metrics={FIGURES}"""
    run_program(args.threads, "scripts/evaluate.py", "table=synthetic_talker", *settings.split())
    yield took("evaluation", begin)
    found = read_json(report / "results.json")
    for system, cells in headline(found).items():
        yield {"system": system, "figures": cells}, f"{system}: {cells}"
    tests = [test for test in found["tests"] if set(test["systems"]) == {"before", "after"}]
    yield {"tests": tests}, f"tests: {tests}"
    draw(footage, report / "outputs", args.work / f"{args.split}.jpg")


def film(root: Path, args: argparse.Namespace) -> float:
    """Create the missing footage and its lists, with distinct sentences. Return the seconds of training clips."""
    maker = ClipMaker(root, SEED, 2)
    counts = {"train": args.clips, "val": args.val_clips, "test": args.test_clips}
    splits = iter([split for split, count in counts.items() for _ in range(count)])
    entries: dict[str, dict[str, Any]] = {}
    index = args.person
    (root / "unseen").mkdir(parents=True, exist_ok=True)
    for split in track(splits, sum(counts.values()), "clips"):
        while True:
            stem = root / "unseen" / clip_id("unseen", index)
            done = is_done(root, "unseen", index, 2)
            entry = json.loads(stem.with_suffix(".json").read_text()) if done else maker.make("unseen", index)
            index += VOICES
            if entry["text"] not in entries:
                break
        entries[entry["text"]] = entry | {"of": split}
    own = [*entries.values()]
    table = [(f"unseen/{e['id']}.mp4", f"unseen/{e['id']}.wav", e["text"], e["of"]) for e in own]
    with atomic_output(root / "clips.csv") as part, part.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "audio", "text", "split"), *table])
    prompt = next((e for e in own if e["of"] == "train" and e["expression"] == "neutral"), own[0])
    shown = {"reference_audio": f"unseen/{prompt['id']}.wav", "reference_video": f"unseen/{prompt['id']}.mp4"}
    for split in ("val", "test"):
        rows = [{"id": e["id"], "text": e["text"], "speaker": "own"} for e in own if e["of"] == split]
        write_text(root / f"{split}.jsonl", "".join(json.dumps(row | shown) + "\n" for row in rows))
    write_text(root / "grammar.jsgf", grammar())
    write_text(root / "free.arpa", language_model())
    return sum(e["seconds"] for e in own if e["of"] == "train")


def motion_stats(work: Path, shards: Path) -> Path:
    """Write the index of the shards with the motion statistics of the initial weights."""
    motion = OmegaConf.load(BUNDLED / "config.yaml").motion
    index = json.loads((shards / "train" / "index.json").read_text())
    write_json(work / "stats.json", index | {"motion_mean": [*motion.mean], "motion_std": [*motion.std]})
    return work / "stats.json"


def draw(footage: Path, outputs: Path, path: Path) -> None:
    """Write the figure of the first test sentence: faces and spectrograms of the ground truth and of the outputs
    before and after fine-tuning.
    """
    row = json.loads((footage / f"{path.stem}.jsonl").read_text().splitlines()[0])
    true = footage / "unseen" / row["id"]
    takes = {"the person": (true.with_suffix(".wav"), true.with_suffix(".mp4"))}
    for name in ("before", "after"):
        stem = outputs / name / row["id"]
        takes[f"{name} fine-tuning"] = stem.with_suffix(".wav"), stem.with_suffix(".mkv")
    how = {"figsize": (12, 3.4), "height_ratios": (1, 1.6)}
    with chart_file(path, 6, 3, row["text"], grid=False, dpi=90, **how) as axes:
        for (name, (wav, video)), top, bottom in zip(takes.items(), axes[:3], axes[3:]):
            wave = read_audio(wav, RATE)
            frames = read_video(video)
            picks = ((np.arange(FACES) + 0.5) * len(frames) / FACES).astype(int)
            top.imshow(np.concatenate(frames[picks], 1))
            top.axis("off")
            top.set_title(name)
            bottom.imshow(spectrogram(wave, RATE), aspect="auto", extent=(0, len(wave) / RATE, 0, 80))
            bottom.set_xlabel("seconds")
        axes[3].set_ylabel("mel band")
