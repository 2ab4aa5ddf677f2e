"""Human speech with text and phonemes, in the layout of version 3 of the synthetic corpus, for training Talker-T2AV.

Recordings of people only have transcripts. Phoneme times are transferred from speech of espeak-ng for the same text, by
dynamic time warping of cepstra (Sakoe & Chiba, 1978).

Axes: N samples, T frames of 10 ms, C cepstra.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torchaudio.functional import highpass_biquad

from corpora.preparation.speech_corpus import (
    LEAST_SECONDS,
    RATE,
    Recording,
    at_speed,
    draw_speeds,
    grid_splits,
    read_recording,
)
from corpora.synthetic.corpus import LEVEL, LONGEST, gain_to_level
from corpora.synthetic.sentences import draw_open_sentence
from corpora.synthetic.speech import Synthesizer
from corpora.synthetic.visemes import FPS
from engine.errors import UserError, printable
from engine.files import report_os_errors, write_json, write_text
from engine.media.audio import SILENT, resample_wave, write_wav
from engine.media.pictures import fit_frames
from engine.media.video import write_video
from engine.nn.mel import mel_filters
from engine.progress import progress_bar
from engine.shards.recordings import read_manifest
from talker_t2av.faces import find_square, read_square

HOP = RATE // 100
SIDE = 128  # side of the frames in pixels, as in the synthetic corpus
HOPS = 100 // FPS  # in a video frame
WINDOW = RATE // 40
BANDS = 40
CEPSTRA = 13
MARGIN = 0.15  # seconds of silence that are kept at both ends
PAUSES = 0.15, 0.6  # the same for video, random: recordings that A2V receives have pauses, in which mouths move, too
RUMBLE = 50.0  # Hz; GRID's recordings have noise below, in some clips louder than the speech
QUIET = 35.0, 20.0  # dB under the loud parts: the most and the least that an end may have to count as silence
WORST = 4.2  # mean distance of cepstra on the path; above it, text and recording differ
LONGEST_FACTOR = 2.5  # recording over espeak-ng's speech, and the inverse; beyond it, they differ
FLITE_VOICES = ("awb", "kal16", "rms", "slt")  # built from recordings of people
VOICES = ("pitch 100 130", "pitch 190 240\nformant 0 115 100 100\nformant 1 115 100 100\nformant 2 115 100 100")


def grid_sentences(root: Path, speakers: list[str]) -> dict[str, list[Recording]]:
    """Find GRID's sentences of the splits train, val and test, as `grid_splits` does.

    The letter A is spelled "ay", as espeak-ng would read it as the article.
    """
    found = {}
    for split, recordings in grid_splits(root, speakers).items():
        texts = [re.sub(r"\ba\b", "ay", recording.text) for recording in recordings]
        found[split] = [replace(recording, text=text) for recording, text in zip(recordings, texts, strict=True)]
    return found


def prompt_sentences(sounds: Path, transcripts: Path) -> list[Recording]:
    """Find the prompts of one language below `sounds` that have a line in `transcripts`, `path/name: What is said.`

    Prompts with text in brackets, which is not speech, are skipped.
    """
    opened = gzip.open if transcripts.suffix == ".gz" else open
    rows = []
    with (
        report_os_errors(f"--transcripts {transcripts} cannot be read"),
        opened(transcripts, "rt", encoding="utf-8", errors="replace") as lines,
    ):
        for line in lines:
            name, colon, text = line.strip().partition(":")
            path = sounds / f"{name}.g722"
            if line.startswith(";") or not colon or any(c in text for c in '[]<>()"') or not path.is_file():
                continue
            text = text.replace("*", " star ").replace("#", " pound ")
            rows.append(Recording(name.replace("/", "-"), path, sounds.name, " ".join(text.split())))
    return rows


def flite_sentences(folder: Path, clips: int, seed: int) -> list[Recording]:
    """Write `clips` sentences of version 3 of the synthetic corpus to `folder`, spoken by each voice of flite.

    flite's voices are built from recordings of people: one joins their diphones, three are statistical models of them
    (Black & Lenzo, 2001; Black, 2006). They can speak any sentence, unlike the other recordings.

    Raises:
        UserError: If flite is not installed.
    """
    if shutil.which("flite") is None:
        raise UserError("--flite requires flite, which is not installed: apt-get install flite")
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for number in progress_bar(range(clips), clips, "flite"):
        for voice in FLITE_VOICES:
            text = draw_open_sentence(rng, "train")
            name = f"flite-{voice}-{number:05d}"
            path = folder / f"{name}.wav"
            call = ["flite", "-voice", voice, "-t", text, "-o", path]
            done = subprocess.run(call, capture_output=True, text=True, errors="replace")
            if done.returncode:
                raise UserError(f"flite cannot speak with the voice {voice}: {printable(done.stderr)[-200:]}")
            rows.append(Recording(name, path, f"flite-{voice}", text))
    return rows


def cepstra(wave: np.ndarray) -> np.ndarray:
    """Return the mel cepstra (T, C) of a wave (N,) at `RATE`, each of zero mean and unit variance."""
    frames = torch.from_numpy(np.ascontiguousarray(wave)).float().unfold(0, WINDOW, HOP) * torch.hann_window(WINDOW)
    mel = (torch.fft.rfft(frames, 1024).abs() @ mel_filters(RATE, 1024, BANDS)).clamp_min(1e-3).log()
    angles = torch.pi / BANDS * torch.outer(torch.arange(BANDS) + 0.5, torch.arange(CEPSTRA))
    found = mel @ angles.cos()
    return ((found - found.mean(0)) / found.std(0).clamp_min(1e-6)).numpy()


def warp(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, float]:
    """Align features `one` (T1, C) with `other` (T2, C) by dynamic time warping.

    Returns:
        The index of the last frame of `other` that is aligned with each frame of `one` (T1,), and the mean distance
        along the path.
    """
    distance = np.sqrt(np.maximum(0, (one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T))
    rows, columns = distance.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0.0
    for diagonal in range(rows + columns - 1):
        i = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        j = diagonal - i
        before = np.minimum(np.minimum(total[i, j + 1], total[i + 1, j]), total[i, j])
        total[i + 1, j + 1] = before + distance[i, j]
    place = np.zeros(rows, int)
    length = 1
    i = rows - 1
    j = columns - 1
    place[i] = j
    while i or j:
        steps = total[i, j], total[i, j + 1], total[i + 1, j]  # both, only `one`, only `other`
        best = int(np.argmin(steps))
        if best != 2:
            i -= 1
        if best != 1:
            j -= 1
        place[i] = max(place[i], j)
        length += 1
    return place, float(total[-1, -1] / length)


def without_rumble(wave: np.ndarray) -> np.ndarray:
    """Remove what is below `RUMBLE` from a waveform (N,) at `RATE`: 25 dB at half of it, 6 dB at it, 1 dB at 85 Hz."""
    once = highpass_biquad(torch.from_numpy(wave.copy()), RATE, RUMBLE)
    return highpass_biquad(once, RATE, RUMBLE).numpy()


def speech_range(wave: np.ndarray) -> slice:
    """Return the samples of a waveform (N,) without its silent ends, except for `MARGIN`, from the start of a video
    frame on.
    """
    frames = wave[: len(wave) // HOP * HOP].reshape(-1, HOP)
    power = np.convolve(np.mean(frames**2, 1), np.ones(5) / 5, "same")
    level = 10 * np.log10(power + 1e-10)
    floor, top = np.percentile(level, [5, 95])
    loud = np.flatnonzero(level > np.clip(0.7 * floor + 0.3 * top, top - QUIET[0], top - QUIET[1]))
    margin = round(MARGIN * RATE / HOP)
    first = max(0, loud[0] - margin) // HOPS * HOPS
    last = min(len(frames), loud[-1] + 1 + margin)
    return slice(first * HOP, last * HOP)


def label(
    wave: np.ndarray, text: str, synthesizer: Synthesizer, voices: Sequence[str] = VOICES
) -> tuple[str, list[tuple[str, float, float]]] | None:
    """Align a trimmed recording (N,) with `text`.

    Args:
        voices: lines of espeak-ng's voice files, of which the one that sounds most similar is used.

    Returns:
        The voice, and the phonemes (symbol, start s, end s). None if the recording has another text.
    """
    best: tuple[float, str, list] = (np.inf, "", [])
    heard = cepstra(wave)
    silence = np.zeros(round(MARGIN * RATE), np.float32)
    for lines in voices:
        spoken = synthesizer.speak(text, lines)
        model = np.concatenate([silence, resample_wave(spoken.wave, spoken.rate, RATE), silence])
        if not 1 / LONGEST_FACTOR < len(wave) / len(model) < LONGEST_FACTOR:
            return None
        place, cost = warp(cepstra(model), heard)
        times = np.concatenate([[0], (place + 1) * HOP / RATE])
        frames = np.arange(len(times)) * HOP / RATE
        phonemes = []
        for symbol, start, end in spoken.phonemes:
            first, last = np.interp([start + MARGIN, end + MARGIN], frames, times)
            phonemes.append((symbol, round(float(first), 4), round(float(max(last, first + 0.01)), 4)))
        best = min(best, (cost, lines, phonemes), key=lambda found: found[0])
    return best[1:] if best[0] < WORST else None


def cut(
    wave: np.ndarray, phonemes: list[tuple[str, float, float]], margin: float = MARGIN
) -> tuple[np.ndarray, list, float]:
    """Trim a recording (N,) to its phonemes and `margin` seconds on both sides, as noise may mask silent ends.

    Returns:
        The trimmed recording, its phonemes, and its start in seconds, which is the start of a video frame.
    """
    first = int(max(0.0, phonemes[0][1] - margin) * FPS) / FPS
    speech = wave[round(first * RATE) : round((phonemes[-1][2] + margin) * RATE)]
    return speech, [(symbol, round(a - first, 4), round(b - first, 4)) for symbol, a, b in phonemes], first


def _rows(recordings: Sequence[Recording], folder: Path, pictures: bool, seed: int) -> Iterator[dict]:
    """Write the recordings of a split and their copies, and yield the rows of those whose text is certain.

    NAME.json is written last, with the rows of a recording, so that an interrupted call can be continued.
    """
    rng = np.random.default_rng(seed)
    synthesizer = Synthesizer()
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, list[str]] = {}  # by speaker, espeak-ng's voice that is nearest
    for recording in progress_bar(recordings, len(recordings), folder.name):
        speeds = draw_speeds(recording.others, rng)
        margin = round(float(rng.uniform(*PAUSES)), 2) if pictures else MARGIN
        made_from = repr((recording, speeds, pictures and margin))
        path = folder / f"{recording.name}.json"
        made = json.loads(path.read_text()) if path.is_file() else {}
        if made.get("made_from") != made_from:
            voices = known.get(recording.speaker, VOICES)
            voice, rows = _clips(recording, folder, speeds, margin, pictures, synthesizer, voices)
            made = {"made_from": made_from, "voice": voice, "rows": rows}
            write_text(path, json.dumps(made))
        if made["voice"]:
            known.setdefault(recording.speaker, [made["voice"]])
        yield from made["rows"]


def _clips(
    recording: Recording,
    folder: Path,
    speeds: Sequence[float],
    margin: float,
    pictures: bool,
    synthesizer: Synthesizer,
    voices: Sequence[str],
) -> tuple[str, list[dict]]:
    """Write a recording at each of the speeds, with `margin` seconds before and after the speech.

    Returns:
        The one of espeak-ng's `voices` that is nearest, and the rows. "" and no rows if the text is in doubt.
    """
    wave = read_recording(recording)
    if len(wave) < LEAST_SECONDS * RATE or np.abs(wave).max() < SILENT:
        return "", []
    if not pictures:  # the sound of a video is kept, as it is the input of A2V
        wave = without_rumble(wave)
    speech = speech_range(wave)
    wave = wave * gain_to_level(wave[speech], LEVEL)  # the level of the synthetic corpus's neutral speech
    labels = label(wave[speech], recording.text, synthesizer, voices)
    if labels is None:
        return "", []
    voice, phonemes = labels
    start = speech.start / RATE
    phonemes = [(symbol, a + start, b + start) for symbol, a, b in phonemes]
    wave, phonemes, start = cut(wave, phonemes, margin)
    if pictures:
        frames = _face(recording.path, round(start * FPS), len(wave) // (RATE // FPS))
        wave = wave[: len(frames) * (RATE // FPS)]
        write_video(folder / f"{recording.name}.mp4", frames, FPS)
    rows = []
    for number, speed in enumerate(speeds):
        other = at_speed(wave, speed)
        factor = len(other) / len(wave)
        frames = len(other) // (RATE // FPS)
        if frames > LONGEST:
            continue
        name = recording.name if number == 0 else f"{recording.name}-{number}"
        write_wav(folder / f"{name}.wav", other, RATE)
        moved = [(symbol, round(a * factor, 4), round(b * factor, 4)) for symbol, a, b in phonemes]
        row = {"id": name, "split": folder.name, "text": recording.text, "phonemes": moved, "expression": "neutral"}
        row |= {"voice": f"{recording.speaker}-{number}", "frames": frames, "seconds": frames / FPS}
        rows.append(row | ({"face": recording.speaker} if pictures else {}))
    return voice, rows


def _face(path: Path, first: int, count: int) -> np.ndarray:
    """Read the square around the face as inference does, in frames `first` to `first` + `count`: (T, S, S, 3)."""
    square = find_square(path, count)
    return fit_frames(np.concatenate(list(read_square(path, square, count, first))), SIDE)


def _synthetic_rows(root: Path, people: dict[str, list[Recording]], clips: int) -> dict[str, list[dict]]:
    """Return rows of a synthetic corpus by split: the first `clips` training clips, and clips of its split `dev`.

    `test` gets the first clips of `dev` and `val` the next ones, each as many as it has recordings, but at most half.
    """
    rows = {"train": read_manifest(root, "train")[:clips]}
    dev = read_manifest(root, "dev")
    start = 0
    for split in ("test", "val"):
        end = start + min(len(people.get(split, ())), len(dev) // 2)
        rows[split] = dev[start:end]
        start = end
    return rows


def write_voices(
    out: Path,
    people: dict[str, list[Recording]],
    synthetic: Path | None,
    clips: int,
    facts: dict,
    pictures: bool = False,
    seed: int = 0,
) -> dict[str, int]:
    """Write a corpus: `people`'s recordings of each split, and clips of a synthetic one.

    Existing recordings are kept, so that an interrupted call can be continued.

    Args:
        synthetic: folder of the synthetic corpus. None: no such clips.
        clips: number of its training clips.
        facts: additional entries of corpus.json.
        pictures: include the video frames of the face, as in version 2 of the synthetic corpus.
        seed: random seed of the speeds.

    Returns:
        The number of clips of each split.
    """
    counts = {}
    others = {} if synthetic is None else _synthetic_rows(synthetic, people, clips)
    for split, recordings in people.items():
        rows = list(_rows(recordings, out / split, pictures, seed))
        for row in others.get(split, ()):
            for suffix in (".wav", ".mp4") if pictures else (".wav",):
                target = (out / split / row["id"]).with_suffix(suffix)
                source = (synthetic / row["split"] / target.name).resolve()
                if target.is_symlink() and target.readlink() != source:
                    target.unlink()  # of a corpus that was moved or replaced
                if not target.exists():
                    target.symlink_to(source)
            rows.append(row | {"split": split})
        if not rows:
            raise UserError(f"no recording of the split {split} has a known text: check the transcripts")
        write_text(out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        counts[split] = len(rows)
    write_json(out / "corpus.json", facts | {"version": 2 if pictures else 3, "rate": RATE, "clips": counts})
    return counts
