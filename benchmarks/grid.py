"""The recipe of docs/grid.md on a stand-in for GRID: WER by training step, from bundled and from random weights.

The stand-in has GRID's folders, names, frames, audio and alignments, with cartoon faces and synthetic voices that no
bundled weights were trained on, and sentences that they were not trained on either. A letter of GRID is spoken as its
code word ("foxtrot"), because letters that look alike on drawn lips could not be distinguished. scripts/recipes/grid.sh
prepares, trains at the size of the bundled model and evaluates. Finished work is skipped.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, run_program, took
from corpora.preparation.sources_grid import ADVERBS, ALIGNMENT_RATE, COLOURS, DIGITS, PREPOSITIONS, UNSEEN, VERBS
from corpora.synthetic.corpus import FRAME, RATE, loudness, speak
from corpora.synthetic.expression import Pose, prosody
from corpora.synthetic.face import Face, draw_motion
from corpora.synthetic.sentences import SLOTS, draw_sentence
from corpora.synthetic.speech import Synthesizer
from corpora.synthetic.visemes import FPS, mouth_track
from corpora.synthetic.voices import draw_traits, looks, voice_lines
from engine.arguments import within
from engine.errors import require
from engine.evaluation.summary import headline
from engine.files import atomic_output, write_text
from engine.media.audio import write_wav
from engine.media.ffmpeg import command
from engine.metrics.recogniser import Recogniser
from engine.metrics.words import count_errors
from engine.progress import track
from engine.training.export import read_log
from engine.untrusted import read_json
from engine.word_times import WordTimes

SPEAKERS = "s1", "s2", "s3", "s4", "s5", "s9", "s6", "s7", "s8", "s10", "s12"  # of GRID, in the order of their voices
FIRST_VOICE = 10_000  # seed; those of the bundled weights are smaller
# sentences by which a voice is tried, and words that a recogniser may miss in them
TRIALS = 25
MOST_WRONG = 1
# of GRID's frames
SIDE = 288
WIDTH = 360
BUNDLED = ROOT / "assets" / "hicodit_tiny"
STARTS = "untrained", "bundled", "nothing"  # the bundled weights as they are; trained from them; from random weights
TRAIN = """task/model=hicodit_tiny task/encoders=tiny task.encoders.phonemes=52 trainer=cpu
trainer.global_batch_size=null trainer.batch_size=16 trainer.warmup=10 trainer.ema_decay=0.9
trainer.log_every=10 trainer.checkpoint_every=20 task.validate_clips=100 task.validate_metrics=[wer]
task.sampler.method=confidence task.sampler.steps=5 task.sampler.temperature=0.7 task.sampler.choice_noise=1.0
task.guidance.identity=0.0 task.guidance.expression=1.0 task.guidance.lip=0.0"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, default=Path("runs/grid_stand_in"), help="output folder")
    parser.add_argument(
        "--speakers",
        type=within(3, len(SPEAKERS) - 3),
        default=3,
        help="number of training speakers; one is for validation, two for the test",
    )
    parser.add_argument("--clips", type=within(1), default=100, help="number of training clips per speaker")
    parser.add_argument("--test-clips", type=within(1), default=100, help="number of clips per held-out speaker")
    parser.add_argument("--steps", type=within(1), default=240, help="training steps of 16 clips from each start")
    parser.add_argument("--every", type=within(1), default=80, help="number of steps between validations")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    grammar = write_grammar(args.work)
    begin = time.monotonic()
    render(args.work / "grid", grammar, args)
    yield took("rendering", begin)
    tokenizer = args.work / "rvq" / "release"  # the bundled one knows such audio, so that none is trained
    shutil.copytree(ROOT / "assets" / "rvq_speech", tokenizer, dirs_exist_ok=True)
    shutil.copytree(BUNDLED, args.work / "untrained" / "release", dirs_exist_ok=True)  # the recipe only evaluates it
    prepare = f"""device={args.device} splits=[train,val] stages.wave.use=false
        stages.crops.encoders.mouth_size=48 stages.crops.encoders.face_size=64"""
    evaluate = f"""device={args.device} workers=1 media=false cache={(args.work / "cache").resolve()}
        protocol.wer=grammar grammar={grammar.resolve()}"""
    for start in STARTS:
        train = f"{TRAIN} trainer.steps={args.steps} trainer.validate_every={args.every}"
        train += f" data.grammar={grammar.resolve()} trainer.device={args.device}"
        train += f" init={BUNDLED}" if start == "bundled" else ""
        paths = {"GRID": "grid", "SHARDS": "shards", "TOKENIZER": "rvq", "RUN": start, "REPORT": f"{start}_report"}
        begin = time.monotonic()
        run_program(
            args.threads, "scripts/recipes/grid.sh", "tokens", "train", "evaluate", PYTHON=sys.executable,
            PROTOCOL="unseen", LAGS="null", PREPARE=prepare, TRAIN=train, EVALUATE=evaluate,
            **{name: str((args.work / path).resolve()) for name, path in paths.items()},
        )  # fmt: skip
        yield took(f"recipe, {start}", begin)
        yield from curve(args.work / start / "log.jsonl", start)
        for system, cells in headline(read_json(args.work / f"{start}_report" / "test" / "results.json")).items():
            yield {"start": start, "test": system, **cells}, f"{start}, test, {system}: {cells}"


def curve(log: Path, start: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Return the WER of each validation, with the training time until then."""
    seconds = 0.0
    last = 0
    for _, record in read_log(log):
        if "step_s" in record:
            seconds = seconds + record["step_s"] * (record["step"] - last)
            last = record["step"]
        if "validation/wer_val" in record:
            row = {"start": start, "step": record["step"], "seconds": round(seconds)}
            row["wer"] = round(100 * record["validation/wer_val"], 2)
            yield row, f"{start}: step {row['step']}, {row['seconds']} s, WER {row['wer']} % (validation)"


def write_grammar(folder: Path) -> Path:
    """Write the grammar of GRID's sentences and the pronunciations of its words, with letters as code words."""
    decoder = require("pocketsphinx", "pocketsphinx").Decoder(loglevel="FATAL")
    letters = {word[0]: word for word in SLOTS[3] if word[0] != "w"}
    slots = [tuple(letters) if index == 3 else words for index, words in enumerate(SLOTS)]
    rules = [f"<slot{index}> = {' | '.join(words)};" for index, words in enumerate(slots)]
    sentence = " ".join(f"<slot{index}>" for index in range(len(slots)))
    lines = ["#JSGF V1.0;", "grammar grid;", f"public <sentence> = {sentence};", *rules, ""]
    said = {word: letters.get(word, word) for words in slots for word in words}
    sounds = [f"{word} {decoder.lookup_word(spoken)}\n" for word, spoken in said.items()]
    write_text(folder / "grid.dict", "".join(sounds))
    write_text(folder / "grid.jsgf", "\n".join(lines))
    return folder / "grid.jsgf"


def as_grid(text: str) -> tuple[str, str]:
    """Return GRID's name and words of a sentence with code words: bbaf2n, bin blue at f two now."""
    words = [word[0] if slot == 3 else word for slot, word in enumerate(text.split())]
    tables = (VERBS, COLOURS, PREPOSITIONS, None, DIGITS, ADVERBS)
    keys = [word if table is None else next(key for key, value in table.items() if value == word)
            for word, table in zip(words, tables)]  # fmt: skip
    return "".join(keys), " ".join(words)


def render(root: Path, grammar: Path, args: argparse.Namespace) -> None:
    """Write the missing clips, such as ROOT/s1/bbaf2n.mpg, and their alignments."""
    synthesizer = Synthesizer()
    recogniser = Recogniser(grammar)
    times = WordTimes()
    seed = FIRST_VOICE
    for speaker in SPEAKERS[: args.speakers + 3]:
        clips = args.test_clips if speaker in UNSEEN else args.clips
        while not understood(seed, synthesizer, recogniser):
            seed += 1
        rng = np.random.default_rng([seed, 0])
        names = {}
        while len(names) < clips:
            text = draw_sentence(rng, "unseen")
            if "whiskey" not in text:  # GRID has no w
                names[as_grid(text)[0]] = text
        for index, (name, text) in enumerate(track(names.items(), len(names), speaker)):
            align = root / "alignments" / speaker / f"{name}.align"  # written last
            if not align.is_file():
                rng = np.random.default_rng([seed, 1, index])
                write_clip(root / speaker / f"{name}.mpg", align, seed, text, synthesizer, times, rng)
        seed += 1


def understood(seed: int, synthesizer: Synthesizer, recogniser: Recogniser) -> bool:
    """Return whether a recogniser understands a voice, measured on sentences of the split `dev`, which no clip
    contains.
    """
    rng = np.random.default_rng([seed, 2])
    wrong = 0
    trials = 0
    while trials < TRIALS and wrong <= MOST_WRONG:
        text = draw_sentence(rng, "dev")
        if "whiskey" not in text:
            wave = speak(synthesizer, text, voice_lines(draw_traits(seed)), [prosody("neutral", 0.0)], rng).wave
            wrong += count_errors(as_grid(text)[1], recogniser.transcribe(wave, RATE))["wer"][0]
            trials += 1
    return wrong <= MOST_WRONG


def write_clip(
    path: Path, align: Path, seed: int, text: str, synthesizer: Synthesizer, times: WordTimes, rng: np.random.Generator
) -> None:
    """Synthesise a clip of a sentence: MPEG-1 with GRID's frame size, and an alignment in GRID's unit of time."""
    traits = draw_traits(seed)
    speech = speak(synthesizer, text, voice_lines(traits), [prosody("neutral", 0.0)], rng)
    length = len(speech.wave) // FRAME
    motion = draw_motion(rng, length, loudness(speech.wave))
    face = Face(looks(traits, seed), float(rng.uniform(0.93, 1.07)))
    frames = face.render(mouth_track(speech.phonemes, length), Pose(), motion)
    with atomic_output(path) as part:
        wav = part.with_suffix(".wav")
        write_wav(wav, speech.wave, RATE)
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{frames.shape[2]}x{frames.shape[1]}", "-r", str(FPS)]
        scale = f"scale={SIDE}:{SIDE},pad={WIDTH}:{SIDE}:(ow-iw)/2:0"
        code = ["-vf", scale, "-c:v", "mpeg1video", "-q:v", "3", "-c:a", "mp2", "-ar", "44100", "-threads", "1"]
        call = [word for word in command("-v", "error", *raw, "-i", "-", "-i", str(wav)) if word != "-nostdin"]
        try:
            subprocess.run([*call, *code, str(part)], input=frames.tobytes(), check=True)
        finally:
            wav.unlink()
    words = times.align(text, speech.wave, RATE)
    spoken = [(word.begin, word.end, name) for word, name in zip(words, as_grid(text)[1].split())]
    end = len(speech.wave) / RATE
    lines = []
    for begin, stop, word in [*spoken, (end, end, "sil")]:
        last = lines[-1][1] if lines else 0.0
        if begin > last:
            lines.append((last, begin, "sil"))
        if word != "sil":
            lines.append((begin, stop, word))
    write_text(align, "".join(f"{a * ALIGNMENT_RATE:.0f} {b * ALIGNMENT_RATE:.0f} {word}\n" for a, b, word in lines))
