"""Clips of an evaluation, read from folders and manifests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.evaluation.statistics import derangement
from engine.files import find_files
from engine.metrics.metric import Take
from engine.untrusted import read_json, read_json_lines, safe_name

SOUND = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac")
VIDEO = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".m4v")
KEYS = ("text", "output", "reference", "video", "speaker", "voice", "language", "heard", "reference_heard")
NUMBERS = ("text", "speaker", "voice")  # keys whose values may be integers
EXCHANGED = ", exchanged"  # suffix of control systems
TRUTH = "true speech"  # name of the ground-truth row
PROMPT = ("reference_audio", "reference_video")


@dataclass(frozen=True)
class Clip:
    """A clip with its ground truth and the output of each system.

    `prompt` is the reference voice and face: those that the manifest names, or those of the next clip of the same
    speaker with another text.
    """

    id: str
    speaker: str | None
    truth: Take
    takes: Mapping[str, Take]
    prompt: Take = field(default_factory=Take)


def read_rows(manifest: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL manifest, each an object with a unique `id`."""
    rows: dict[str, dict[str, Any]] = {}
    for where, row in read_json_lines(manifest, f"manifest={manifest}"):
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object: write id, text, reference, output, ... of one clip")
        if not isinstance(row.get("id"), str):
            raise UserError(f"{where}: id must be a string, the name of the clip's files without suffix")
        safe_name(row["id"], f"{where}: id", folders=True)
        for key in (*KEYS, *PROMPT):
            if not isinstance(row.get(key), (str | int if key in NUMBERS else str) | None):
                raise UserError(f"{where}: {key} must be a string")
        if row["id"] in rows:
            raise UserError(f"{where}: id {row['id']} is not unique")
        rows[row["id"]] = row
    if not rows:
        raise UserError(f"manifest={manifest} lists no clips")
    return [*rows.values()]


def read_clips(
    manifest: Path | None, references: Path | None, outputs: Mapping[str, Path], count: int | None = None
) -> list[Clip]:
    """Return the clips of a manifest, or of all files of `references`. `count` limits them to evenly spaced clips.

    Paths in a manifest are relative to its folder. Missing files stay None and are reported when they are measured.
    Without a manifest, texts are read from ID.txt next to the ground-truth files, and folders are speakers. `outputs`
    are the folders of the systems, with files ID.wav or ID.mp4; without any, the manifest names the outputs of one
    system.

    Raises:
        UserError: If the manifest is invalid, or a folder does not exist.
    """
    if TRUTH in outputs:
        raise UserError(f"outputs: {TRUTH!r} is the name of the ground-truth row; choose another name for the system")
    for name, folder in {"references": references, **{f"outputs.{k}": v for k, v in outputs.items()}}.items():
        if folder is not None and not folder.is_dir():
            raise UserError(f"{name}={folder} is not a folder")
    base = Path()
    if manifest is not None:
        rows = read_rows(manifest)
        base = manifest.parent
        if outputs:
            rows = [{**row, "output": None} for row in rows]  # those of `outputs` are measured
            if len(outputs) > 1 and any(row.get("heard") for row in rows):
                raise UserError(f"manifest={manifest}: heard is the transcript of one system, not of {len(outputs)}")
        elif any(row.get("output") for row in rows):
            outputs = {"output": base}
    elif references is not None:
        names = dict.fromkeys(file.with_suffix("").as_posix() for file in find_files(references, *SOUND, *VIDEO))
        rows = [{"id": n, "text": text_of(references, n), "speaker": n.rpartition("/")[0] or None} for n in names]
        if not rows:
            raise UserError(f"references={references} contains no audio or video files")
    else:
        raise UserError("ground-truth files are required: references=FOLDER, or manifest=FILE.jsonl that names them")
    clips = _with_prompts([_clip(row, base, references, outputs) for row in rows])
    chosen = np.linspace(0, len(rows) - 1, min(count or len(rows), len(rows))).round().astype(int)
    return [clips[i] for i in chosen]


def read_corpus(corpus: Path, split: str, outputs: Mapping[str, Path], count: int | None = None) -> list[Clip]:
    """Read evenly spaced clips of a split of a synthetic corpus.

    The prompt of a clip is the first clip of the same voice with another text, in the training split or the same split,
    if possible with a neutral face.

    Args:
        corpus: folder of the corpus.
        outputs: folder of the outputs of each system.
        count: number of clips; None: all.

    Raises:
        UserError: If the corpus does not contain the split.
    """
    if not (corpus / f"{split}.jsonl").is_file():
        make = "python scripts/make_synthetic_corpus.py --version 2 --out"
        raise UserError(f"corpus={corpus} has no split {split}: choose another split, or create it ({make} {corpus})")
    clips = read_clips(corpus / f"{split}.jsonl", corpus / split, outputs, count)
    known = []
    for source in dict.fromkeys(("train", split)):
        if (corpus / f"{source}.jsonl").is_file():
            known += [(row, corpus / source / row["id"]) for row in read_rows(corpus / f"{source}.jsonl")]
    known.sort(key=lambda item: item[0].get("expression") != "neutral")
    prompts = []
    for clip in clips:
        paths = (path for row, path in known if str(row["voice"]) == clip.speaker and row["text"] != clip.truth.text)
        path = next(paths, None)
        prompts.append(Take() if path is None else Take(path.with_suffix(".wav"), path.with_suffix(".mp4")))
    return [replace(clip, prompt=prompt) for clip, prompt in zip(clips, prompts)]


def with_exchanged(clips: Sequence[Clip]) -> list[Clip]:
    """Add to each system a control, `NAME, exchanged`, that replaces its output for each clip by its output for another
    clip.

    The control shows the value of a metric for outputs that do not depend on their clip. A single clip has no control.
    """
    if len(clips) < 2:
        return [*clips]
    found = []
    for clip, other in zip(clips, derangement(len(clips), np.random.default_rng(0))):
        controls = {}
        for name, take in clip.takes.items():
            foreign = clips[other].takes[name]
            controls[name + EXCHANGED] = replace(take, audio=foreign.audio, video=foreign.video, heard=foreign.heard)
        found.append(replace(clip, takes={**clip.takes, **controls}))
    return found


def text_of(folder: Path, name: str) -> str | None:
    """Return the text of NAME.txt, or of NAME.normalized.txt (LibriTTS). None if neither exists."""
    for suffix in (".txt", ".normalized.txt"):
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return words_of(path.read_text(encoding="utf-8-sig", errors="replace")) or None
    return None


def words_of(transcript: str) -> str:
    """Return the words of a transcript: its `Text:` line (LRS2 and LRS3), or all of it."""
    marked = (line for line in transcript.splitlines() if line.startswith("Text:"))
    return " ".join(next(marked, transcript).removeprefix("Text:").split())


def _with_prompts(clips: Sequence[Clip]) -> list[Clip]:
    """Return the clips, those without a prompt with the next clip of the same speaker that has another text."""
    spoken: dict[str | None, list[Take]] = defaultdict(list)
    turns = []  # index of each clip among those of its speaker
    for clip in clips:
        turns.append(len(spoken[clip.speaker]))
        spoken[clip.speaker].append(clip.truth)
    found = []
    for clip, turn in zip(clips, turns):
        takes = spoken[clip.speaker]
        if clip.prompt == Take() and clip.speaker is not None:
            later = (takes[(turn + step) % len(takes)] for step in range(1, len(takes)))
            clip = replace(clip, prompt=next((take for take in later if take.text != clip.truth.text), Take()))
        found.append(clip)
    return found


def _clip(row: Mapping[str, Any], base: Path, references: Path | None, outputs: Mapping[str, Path]) -> Clip:
    source = base / row["video"] if row.get("video") else None
    truth = find_take(references, row["id"]) if references else Take()
    if row.get("reference"):
        truth = _take(base / row["reference"], truth)
    text = str(row["text"]) if row.get("text") not in (None, "") else None
    source = source or truth.video
    speaker = row.get("speaker", row.get("voice"))
    speaker = None if speaker is None else str(speaker)
    spoken = {"source": source, "text": text, "language": str(row.get("language") or "en"), "speaker": speaker}
    truth = replace(truth, **spoken, video=truth.video or source, heard=row.get("reference_heard"), about=row)
    takes = {}
    for name, folder in outputs.items():
        take = find_take(folder, row["id"])
        facts = system_facts(folder)
        about = folder / f"{row['id']}.json"
        if row.get("output"):
            take = _take(base / row["output"], take)
        if facts.get("given") == "video":
            take = replace(take, video=source)
        stated = read_json(about) if about.is_file() else {}
        system = {"given": facts.get("given"), "bits": facts.get("bits_per_second"), "about": stated}
        takes[name] = replace(take, **spoken, heard=row.get("heard"), **system)
    prompt = Take(*(base / row[key] if row.get(key) else None for key in PROMPT))
    return Clip(row["id"], speaker, truth, takes, prompt)


def _take(path: Path, other: Take) -> Take:
    """Return the take of a given file: its audio and, for a video, its frames."""
    return Take(path, path if path.suffix.lower() in VIDEO else other.video)


def find_take(folder: Path, name: str) -> Take:
    """Return the take of NAME: FOLDER/NAME.wav or another audio file, and FOLDER/NAME.mp4 or another video file."""

    def first(suffixes: tuple[str, ...]) -> Path | None:
        paths = (folder / f"{name}{case}" for suffix in suffixes for case in (suffix, suffix.upper()))
        return next((path for path in paths if path.is_file()), None)

    video = first(VIDEO)
    return Take(first(SOUND) or video, video)


def system_facts(folder: Path) -> dict[str, Any]:
    """Return the contents of FOLDER/system.json, which describes the system that generated the outputs; {} if it does
    not exist.
    """
    path = folder / "system.json"
    if not path.is_file():
        return {}
    facts = read_json(path)
    if not isinstance(facts, dict) or not isinstance(facts.get("bits_per_second", 0.0), int | float):
        raise UserError(f"{path} must be a JSON object, and its bits_per_second a number")
    return facts
