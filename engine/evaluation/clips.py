"""Which files belong together: the clips of an evaluation, from folders and a manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.evaluation.statistics import derangement
from engine.metrics.metric import Take
from engine.untrusted import read_json, read_json_lines, safe_name

SOUND = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac")
VIDEO = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".m4v")
KEYS = ("text", "output", "reference", "video", "speaker", "voice", "language", "heard", "reference_heard")
EXCHANGED = ", exchanged"  # ends the name of a control: a system's outputs for other clips
TRUTH = "true speech"  # the name of the true row
PROMPT = ("reference_audio", "reference_video")


@dataclass(frozen=True)
class Clip:
    """A clip as it was recorded, and as each system gives it.

    `prompt` is the voice and the face that a system is shown: those that the manifest names, or those of the next clip
    of the same speaker with other words.
    """

    id: str
    speaker: str | None
    truth: Take
    takes: Mapping[str, Take]
    prompt: Take = field(default_factory=Take)


def read_rows(manifest: Path) -> list[dict[str, Any]]:
    """Return the lines of a manifest, JSON objects with a unique `id`."""
    rows: dict[str, dict[str, Any]] = {}
    for where, row in read_json_lines(manifest, f"manifest={manifest}"):
        if not isinstance(row, dict):
            raise UserError(f"{where} is no JSON object: write id, text, reference, output, ... of one clip")
        if not isinstance(row.get("id"), str):
            raise UserError(f"{where}: id must be text in quotes, the name of the clip's files without suffix")
        safe_name(row["id"], f"{where}: id", folders=True)
        for key in (*KEYS, *PROMPT):
            if not isinstance(row.get(key), str | int | None):
                raise UserError(f"{where}: {key} must be text")
        if row["id"] in rows:
            raise UserError(f"{where}: id {row['id']} is there twice")
        rows[row["id"]] = row
    if not rows:
        raise UserError(f"manifest={manifest} lists no clips")
    return [*rows.values()]


def read_clips(
    manifest: Path | None, references: Path | None, outputs: Mapping[str, Path], count: int | None = None
) -> list[Clip]:
    """Return the clips of a manifest, or of all files of `references`; `count` of them, evenly spread.

    Paths in a manifest count from its folder. A file that is not there stays None, and is told when it is measured.
    Without a manifest, texts are those of ID.txt beside the ground-truth files, and folders are speakers. `outputs` are
    the folders of the systems.
    """
    if TRUTH in outputs:
        raise UserError(f"outputs: {TRUTH!r} is the name of the true row; give the system another one")
    for name, folder in {"references": references, **{f"outputs.{k}": v for k, v in outputs.items()}}.items():
        if folder is not None and not folder.is_dir():
            raise UserError(f"{name}={folder} is not a folder")
    base = Path()
    if manifest is not None:
        rows = read_rows(manifest)
        base = manifest.parent
        if not outputs and any(row.get("output") for row in rows):
            outputs = {"output": base}
    elif references is not None:
        found = sorted(p for p in references.rglob("*") if p.suffix.lower() in SOUND + VIDEO and p.is_file())
        names = dict.fromkeys(p.relative_to(references).with_suffix("").as_posix() for p in found)
        rows = [{"id": n, "text": text_of(references, n), "speaker": n.rpartition("/")[0] or None} for n in names]
        if not rows:
            raise UserError(f"references={references} holds no audio or video files")
    else:
        raise UserError("give the ground-truth files: references=FOLDER, or manifest=FILE.jsonl that names them")
    clips = [_clip(row, base, references, outputs) for row in rows]
    chosen = np.linspace(0, len(rows) - 1, min(count or len(rows), len(rows))).round().astype(int)
    return [replace(c, prompt=_prompt(c, clips)) if c.prompt == Take() else c for c in (clips[i] for i in chosen)]


def read_corpus(corpus: Path, split: str, outputs: Mapping[str, Path], count: int | None = None) -> list[Clip]:
    """Read clips of a split of a synthetic corpus, evenly spread.

    The prompt of each is the first clip of its voice in the training or the same split with other words, if possible
    one with a neutral face.
    """
    if not (corpus / f"{split}.jsonl").is_file():
        make = "python scripts/make_synthetic_corpus.py --version 2 --out"
        raise UserError(f"corpus={corpus} has no split {split}: name another one, or make it ({make} {corpus})")
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


def with_exchanged(clips: Sequence[Clip], seed: int = 0) -> list[Clip]:
    """Return the clips with a control for each system, `NAME, exchanged`: its output for another clip in place of each.

    What any figure of an output would be if it did not depend on its clip. A single clip has no control.
    """
    if len(clips) < 2:
        return [*clips]
    found = []
    for clip, other in zip(clips, derangement(len(clips), np.random.default_rng(seed))):
        controls = {}
        for name, take in clip.takes.items():
            foreign = clips[other].takes[name]
            controls[name + EXCHANGED] = replace(take, audio=foreign.audio, video=foreign.video, heard=foreign.heard)
        found.append(replace(clip, takes={**clip.takes, **controls}))
    return found


def text_of(folder: Path, name: str) -> str | None:
    """Return the words of NAME.txt, or of NAME.normalized.txt (LibriTTS); None if there are none."""
    for suffix in (".txt", ".normalized.txt"):
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return words_of(path.read_text(encoding="utf-8-sig", errors="replace")) or None
    return None


def words_of(transcript: str) -> str:
    """Return the words of a transcript: what its line `Text:` says (LRS2 and LRS3), or all of it."""
    marked = (line for line in transcript.splitlines() if line.startswith("Text:"))
    return " ".join(next(marked, transcript).removeprefix("Text:").split())


def _prompt(clip: Clip, clips: Sequence[Clip]) -> Take:
    same = [c.truth for c in clips if clip.speaker is not None and c.speaker == clip.speaker]
    at = next((i for i, take in enumerate(same) if take == clip.truth), 0)
    return next((take for take in same[at + 1 :] + same[:at] if take.text != clip.truth.text), Take())


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
            take = _take(folder / row["output"], take)
        if facts.get("given") == "video":
            take = replace(take, video=source)
        stated = read_json(about) if about.is_file() else {}
        system = {"given": facts.get("given"), "bits": facts.get("bits_per_second"), "about": stated}
        takes[name] = replace(take, **spoken, heard=row.get("heard"), **system)
    prompt = Take(*(base / row[key] if row.get(key) else None for key in PROMPT))
    return Clip(row["id"], speaker, truth, takes, prompt)


def _take(path: Path, other: Take) -> Take:
    """The take of a file that is named: its audio and, of a video, its picture."""
    return Take(path, path if path.suffix.lower() in VIDEO else other.video)


def find_take(folder: Path, name: str) -> Take:
    """Return FOLDER/NAME.wav, or another audio or the video's, and FOLDER/NAME.mp4, or another video."""

    def first(suffixes: tuple[str, ...]) -> Path | None:
        return next((path for s in suffixes if (path := folder / f"{name}{s}").is_file()), None)

    video = first(VIDEO)
    return Take(first(SOUND) or video, video)


def system_facts(folder: Path) -> dict[str, Any]:
    """Return what FOLDER/system.json says of the system whose outputs are there; {} without that file."""
    path = folder / "system.json"
    if not path.is_file():
        return {}
    facts = read_json(path)
    if not isinstance(facts, dict) or not isinstance(facts.get("bits_per_second", 0.0), int | float):
        raise UserError(f"{path} must be a JSON object, and its bits_per_second a number")
    return facts
