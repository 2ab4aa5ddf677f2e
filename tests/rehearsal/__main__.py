"""Walk the documented commands: `python -m tests.rehearsal [--work FOLDER] [--tree NAME=FOLDER ...] [--only TEXT] ...`

Without options: small trees of the data sets and small stand-ins of the released weights are made, and all commands of
README.md and docs/*.md are run in the order of the pages, scaled down as table.yaml says. The exit code is 0 if every
command that is not excused ended with 0, and every preparation made clips.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine.errors import UserError
from engine.optional import require_librosa
from tests.rehearsal.commands import ROOT
from tests.rehearsal.walk import Runner, Step, plan, run_forked, set_up, wait

IMPORTED = (  # what commands import, loaded once
    "corpora.preparation.job", "corpora.preparation.faces", "corpora.preparation.filters", "corpora.preparation.media",
    "corpora.preparation.networks", "corpora.preparation.sources_listed", "corpora.preparation.sources_studio",
    "corpora.preparation.sources_footage", "corpora.synthetic.corpus", "engine.training.trainer", "hicodit.inference",
    "hicodit.evaluation", "hicodit.task", "talker_t2av.inference", "talker_t2av.task",
    "tests.rehearsal.checkpoints", "tests.rehearsal.trees", "transformers.models.whisper", "matplotlib.pyplot",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.rehearsal", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--work", type=Path, help="folder of the walk, which must not exist (default: a temporary one)")
    parser.add_argument(
        "--tree", action="append", default=[], metavar="[NAME=]FOLDER",
        help="walk with this folder instead of a made-up one; NAME: lrs3, lrs2, vox2, grid, crema_d, ravdess, "
        "talker_t2av_data, emilia, youtube, footage; without NAME: a folder that holds folders of these names",
    )  # fmt: skip
    parser.add_argument("--only", default="", help="run only commands with this regular expression (and downloads)")
    parser.add_argument("--list", action="store_true", help="print what would be run, and what is not and why")
    args = parser.parse_args()
    work = (args.work or Path(tempfile.mkdtemp()) / "work").resolve()
    steps = plan(work)
    if args.list:
        for step in steps:
            print(f"{step.command.place}: {step.call or f'not run: {step.reason}'}")
        return 0
    start = time.monotonic()
    set_up(work)
    chosen = [step for step in steps if step.words and re.search(args.only, step.command.text)]
    if any("DOWNLOADED" in step.command.text for step in chosen):  # which the first download of all files makes
        first = next(step for step in steps if "download_checkpoints.py all" in step.command.text)
        chosen = [step for step in steps if step in chosen or step is first]
    passed_over = [step for step in chosen if step.missing]
    failed = walk([step for step in chosen if not step.missing], args, work)
    for step in passed_over:
        print(f"passed over, as it needs {step.missing}: {step.command.place}  {step.command.text}")
    ran, excused = len(chosen) - len(passed_over), sum(bool(step.reason) for step in steps)
    took = time.monotonic() - start
    print(f"{ran} commands, {failed} failed, {len(passed_over)} passed over, {excused} excused; {took:.0f} s")
    if args.work is None and not failed:
        shutil.rmtree(work.parent)
    elif failed:
        print(f"logs: {work / 'logs'}")
    return int(bool(failed))


def walk(steps: list[Step], args: argparse.Namespace, work: Path) -> int:
    """Make what the commands need, and run them; returns how many failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "PYTHONPATH": f"{ROOT}:{ROOT / 'codecs'}"}
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "MPLBACKEND": "agg"}
    for name in IMPORTED:
        importlib.import_module(name)
    with suppress(ImportError):
        importlib.import_module("resemblyzer")
    with suppress(UserError):
        require_librosa()
    weights, builders = work / "published", make_trees(args.tree, work)
    builders["the stand-ins of the released weights"] = lambda: write_weights(weights)
    builders["the clips of the examples"] = lambda: write_examples(work)
    for what, make in builders.items():
        began = time.monotonic()
        if wait([run_forked(make, work / "logs" / "made.log")]):
            raise SystemExit(f"{what} could not be made: see {work / 'logs' / 'made.log'}")
        print(f"{time.monotonic() - began:5.1f} s  {what}", flush=True)
    server = run_forked(lambda: serve(weights, work, port), work / "logs" / "server.log")
    began = time.monotonic()
    while not (work / "catalogue.yaml").is_file() and time.monotonic() - began < 300:
        time.sleep(0.05)
    try:
        failed, runner = 0, Runner(work)
        for number, step in enumerate(steps):
            log, began = work / "logs" / f"{number:02d}.log", time.monotonic()
            code = runner.run(step.words, step.environment, log)
            problem = f"exit code {code}" if code else unfinished(step, work)
            failed += bool(problem)
            print(f"{time.monotonic() - began:5.1f} s  {step.command.place}  {step.command.text.splitlines()[0][:110]}")
            if problem:
                print(f"    FAILED ({problem}): {step.call}\n    " + "\n    ".join(log.read_text().splitlines()[-12:]))
            sys.stdout.flush()
        return failed
    finally:
        os.kill(server, 9)
        os.waitpid(server, 0)


def make_trees(given: list[str], work: Path) -> dict[str, Callable[[], None]]:
    """Links to the user's trees in WORK/data, and what builds the others."""
    from tests.rehearsal.trees import TREES, build

    (work / "data").mkdir()
    for text in given:
        name, equals, folder = text.partition("=")
        found = {name: Path(folder)} if equals else {each: Path(name) / each for each in TREES}
        for each, place in found.items():
            if each not in TREES:
                raise SystemExit(f"--tree {text}: names are {', '.join(TREES)}")
            if place.is_dir():
                (work / "data" / each).symlink_to(place.resolve())
            elif equals:
                raise SystemExit(f"--tree {text}: {folder} is not a folder")
    left = [name for name in TREES if not (work / "data" / name).exists()]
    return {f"a tree of {name}": lambda name=name: build(name, work / "data" / name) for name in left}


def write_weights(folder: Path) -> None:
    from tests.rehearsal import checkpoints

    checkpoints.write(folder)


def write_examples(work: Path) -> None:
    """The files that the documentation's examples name, and a small Whisper."""
    from tests.rehearsal import checkpoints
    from tests.rehearsal.trees import sound, write_clip, write_sound

    for number, name in enumerate(("clip.mp4", "clips/one.mp4", "clips/two.mp4", "F.mp4", "C.mp4")):
        write_clip(work / name, number, silent=number == 0)
    for number, name in enumerate(("voice.wav", "V.wav", "S.wav")):
        write_sound(work / name, sound(number))
    jobs = [{"mode": "tts", "text": "hello", "reference_audio": "V.wav"}]
    jobs.append({"mode": "a2v", "audio": "S.wav", "reference_video": "F.mp4"})
    (work / "many.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    for name, run in (("NAME", "hicodit_synthetic"), ("A", "hicodit_synthetic"), ("B", "talker_synthetic")):
        (work / "runs").mkdir(exist_ok=True)
        (work / "runs" / name).symlink_to(run)
    for name in ("TUNED", "BEFORE"):
        (work / name).symlink_to("assets/rvq_tiny")
    checkpoints.whisper(work / "whisper", "a")
    checkpoints.qwen(work / "QWEN")
    checkpoints.speech_only(work / "TTS")


def serve(weights: Path, work: Path, port: int) -> None:
    from tests.rehearsal.checkpoints import Mirror

    Mirror(weights, work / "catalogue.yaml", port).server.serve_forever()


def unfinished(step: Step, work: Path) -> str:
    """What a command that ended with 0 has left undone; "" for nothing."""
    output = next((word.partition("=")[2] for word in step.words if word.startswith("output=")), "")
    if not any(word.endswith("prepare_data.py") for word in step.words) or not output:
        return ""
    indices = list((work / output).glob("*/index.json"))
    empty = [str(path) for path in indices if json.loads(path.read_text())["clips"] == 0]
    return f"no clips in {', '.join(empty)}" if empty else "" if indices else f"no index below {output}"


if __name__ == "__main__":
    sys.exit(main())
