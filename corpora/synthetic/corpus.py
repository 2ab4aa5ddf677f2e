"""Clips of the corpus: each is a function of (version, seed, split, index), independent of the process and
the order.

Version 2 has a rule from face to voice, expressions that change within half of the clips, and free sentences beside
those of a closed vocabulary, each for half of the clips. Version 3 is speech alone, without video, by the same
voices: open sentences in one style, half of them neutral.

Axes: N samples, T video frames (25 per second), J half seconds.
"""

from __future__ import annotations

import io
import json
import math
import subprocess
import wave as wave_file
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np

from corpora.synthetic.expression import Prosody, draw_change, draw_expression, ease, pose, prosody
from corpora.synthetic.face import Face, draw_motion
from corpora.synthetic.portrait import SIZE
from corpora.synthetic.sentences import SPLITS, draw_open_sentence, draw_sentence, plain_sentences
from corpora.synthetic.speech import Synthesizer, Utterance
from corpora.synthetic.visemes import FPS, MOUTH, mouth_track
from corpora.synthetic.voices import Voice, load_voices
from engine.files import atomic_output, write_text

RATE = 24_000
FRAME = RATE // FPS  # samples per frame
_WORDS_PER_MINUTE = 150
LEVEL = 10 ** (-25 / 20)  # RMS of neutral speech
_ROOM_TONE = 1e-3  # RMS; recognisers misread digital silence
LONGEST = 8 * FPS  # frames of a clip of version 3


@dataclass(frozen=True)
class Speech:
    """Audio of a clip and its annotations.

    Attributes:
        wave: (frames * 960,) float32 at 24 kHz, with about 0.15 s of room tone at both ends.
        phonemes: (symbol, start s, end s).
        change: time in seconds at which the speaking style changes. None with a single style.
    """

    wave: np.ndarray
    phonemes: list[tuple[str, float, float]]
    change: float | None

    @property
    def frames(self) -> int:
        """Number of video frames."""
        return len(self.wave) // FRAME


def speak(
    synthesizer: Synthesizer, text: str, lines: str, styles: Sequence[Prosody], rng: np.random.Generator
) -> Speech:
    """Synthesise `text` in one speaking style, or with a change to a second style at a word in the middle.

    Args:
        lines: lines of the espeak-ng voice file.
    """
    pitch, span, speed, gain = rng.normal(0, 1, 4).tolist()
    lead, tail = rng.uniform(0.11, 0.19, 2).tolist()  # seconds
    takes = []
    for style in styles:
        spoken = synthesizer.speak(
            text,
            lines,
            pitch=int(np.clip(round(style.pitch + 1.5 * pitch), 0, 99)),
            span=int(np.clip(round(style.span + 2 * span), 0, 99)),
            words_per_minute=round(_WORDS_PER_MINUTE * style.speed * (1 + 0.02 * np.clip(speed, -2, 2))),
        )
        level = LEVEL * 10 ** ((style.gain + 0.4 * gain) / 20)
        speech = resample(spoken.wave, spoken.rate, RATE)
        takes.append(replace(spoken, wave=speech * gain_to_level(speech, level), rate=RATE))
    if len(takes) == 1:
        speech = takes[0].wave
        phonemes = takes[0].phonemes
        cut = None
    else:
        speech, phonemes, cut = splice(*takes, rng)
    start = int(lead * RATE)
    frames = math.ceil((start + len(speech) + tail * RATE) / FRAME)
    wave = rng.normal(0, _ROOM_TONE, frames * FRAME).astype(np.float32)
    wave[start : start + len(speech)] += speech
    shift = start / RATE
    phonemes = [(symbol, round(a + shift, 4), round(b + shift, 4)) for symbol, a, b in phonemes]
    return Speech(wave, phonemes, None if cut is None else round(cut + shift, 4))


def splice(
    first: Utterance, second: Utterance, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[str, float, float]], float]:
    """Join two takes of a text at a word in the middle of the first: waveform, phonemes, time of the change."""
    starts = np.array([first.phonemes[i][1] for i in first.words])
    position = starts * first.rate / len(first.wave)
    near = np.flatnonzero((position > 0.3) & (position < 0.65))
    word = int(rng.choice(near)) if len(near) else int(np.abs(position - 0.5).argmin())
    i = first.words[word]
    j = second.words[word]
    cut = float(starts[word])
    resume = second.phonemes[j][1]
    a = int(cut * RATE)
    b = int(resume * RATE)
    fade = min(RATE // 100, int(resume * RATE), int(cut * RATE))
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    across = first.wave[a - fade : a] * (1 - ramp) + second.wave[b - fade : b] * ramp
    wave = np.concatenate([first.wave[: a - fade], across, second.wave[b:]])
    rest = [(symbol, x - resume + cut, y - resume + cut) for symbol, x, y in second.phonemes[j:]]
    return wave, first.phonemes[:i] + rest, cut


def gain_to_level(wave: np.ndarray, level: float) -> float:
    """Return the gain that scales a waveform (N,) to the RMS `level`, or to the peak 0.97 if this is less."""
    rms = float(np.sqrt(np.mean(wave**2)))
    peak = float(np.abs(wave).max())
    return min(level / max(1e-6, rms), 0.97 / max(1e-6, peak))


def resample(wave: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Resample a clip that begins and ends in silence through its spectrum."""
    step = math.gcd(rate, to)
    size = math.ceil((len(wave) + rate // 50) / (rate // step)) * (rate // step)
    length = size * to // rate
    spectrum = np.fft.rfft(wave.astype(np.float64), size)
    bins = np.zeros(length // 2 + 1, complex)
    count = min(len(spectrum), len(bins))
    bins[:count] = spectrum[:count]
    return (np.fft.irfft(bins, length) * (length / size)).astype(np.float32)[: math.ceil(len(wave) * to / rate)]


def loudness(wave: np.ndarray) -> np.ndarray:
    """Return the smoothed RMS level of each video frame relative to the maximum: (N,) -> (T,) in [0, 1]."""
    level = np.sqrt(np.mean(wave.reshape(-1, FRAME) ** 2, 1))
    level = np.convolve(np.pad(level, 3, mode="edge"), np.hanning(9)[1:-1] / 4, "valid")
    return level / max(1e-6, level.max())


def clip_id(split: str, index: int) -> str:
    """Return the name of a clip, such as train_000001."""
    return f"{split}_{index:06d}"


def window_expressions(frames: int, first: str, second: str, change: float | None) -> list[str]:
    """Return the expression at the centre of each half second (J,), the last of which may be partial."""
    ends = [min(0.5 * (j + 1), frames / FPS) for j in range(-(-2 * frames // FPS))]
    middles = [0.5 * (0.5 * j + end) for j, end in enumerate(ends)]
    return [first if change is None or middle < change else second for middle in middles]


class ClipMaker:
    """Generates the clips of a corpus in `root`, one object per process. `more`: number of additional training
    voices.
    """

    def __init__(self, root: Path, seed: int, version: int, more: int = 0) -> None:
        cv2.setNumThreads(1)
        self._root = root
        self._seed = seed
        self._version = version
        voices = load_voices(more)
        groups = {group: [v for v in voices if v.group == group] for group in ("train", "dev", "unseen", "more")}
        self._voices = groups | {"seen": groups["train"], "plain": groups["unseen"][:30]}
        # alternate known and unknown voices
        self._voices["dev"] = [v for pair in zip(groups["train"], cycle(groups["dev"])) for v in pair]
        self._voices["train"] = groups["train"] + groups["more"]
        self._synthesizer = Synthesizer()

    def make(self, split: str, index: int) -> dict:
        """Write the .mp4 (except in version 3), .wav and finally the .json of a clip. Return the contents of
        the .json.
        """
        rng = np.random.default_rng([self._seed, SPLITS[self._version].index(split), index, self._version])
        voice = self._voices[split][index % len(self._voices[split])]
        stem = self._root / split / clip_id(split, index)
        if self._version == 2:
            speech, facts = self._face_clip(rng, split, voice, stem)
        else:
            speech, facts = self._speech_clip(rng, split, voice, index)
        entry = {"id": stem.name, "split": split} | facts | {"seed": self._seed}
        write_wave(stem.with_suffix(".wav"), speech.wave)
        write_text(stem.with_suffix(".json"), json.dumps(entry))
        return entry

    def _speech_clip(self, rng: np.random.Generator, split: str, voice: Voice, index: int) -> tuple[Speech, dict]:
        """Speak an open sentence of at most `LONGEST` frames in one style. Return it with its entries of the .json."""
        expression, intensity = draw_expression(rng)
        if rng.random() >= 0.5:
            expression = "neutral"
            intensity = 0.0
        while True:
            text = plain_sentences()[index] if split == "plain" else draw_open_sentence(rng, split)
            speech = speak(self._synthesizer, text, voice.lines, [prosody(expression, intensity)], rng)
            if speech.frames <= LONGEST:
                return speech, _describe(speech, text, voice, expression, intensity)

    def _face_clip(self, rng: np.random.Generator, split: str, voice: Voice, stem: Path) -> tuple[Speech, dict]:
        """Speak a sentence in one or two styles and render the face. Return the speech and the entries of the .json."""
        free = bool(rng.random() < 0.5)
        changing = bool(rng.random() < 0.5)
        text = draw_sentence(rng, split, free)
        expression, intensity = draw_expression(rng)
        shown = draw_change(rng) if changing else (expression,)
        styles = [prosody(name, intensity) for name in shown]
        speech = speak(self._synthesizer, text, voice.lines, styles, rng)
        windows = window_expressions(speech.frames, shown[0], shown[-1], speech.change)
        facts = _describe(speech, text, voice, max(shown, key=windows.count), intensity)
        facts |= self._draw(rng, voice, speech, shown, intensity, stem)
        facts |= {"grammar": "free" if free else "closed", "expressions": windows, "change": speech.change}
        return speech, facts | {"traits": vars(voice.traits)}

    def _draw(
        self, rng: np.random.Generator, voice: Voice, speech: Speech, shown: Sequence[str], intensity: float, stem: Path
    ) -> dict:
        """Render the video of a speaking face with one or two expressions. Return its entries of the .json."""
        frames = speech.frames
        light = float(rng.uniform(0.93, 1.07))
        mouth = mouth_track(speech.phonemes, frames)
        mouth[:, MOUTH.index("open")] *= rng.uniform(0.93, 1.05)
        motion = draw_motion(rng, frames, loudness(speech.wave))
        looks = [pose(name, intensity) for name in shown]
        looks = looks[0] if len(looks) == 1 else ease((np.arange(frames) + 0.5) / FPS, speech.change, *looks)
        write_video(stem.with_suffix(".mp4"), Face(voice.face, light).render(mouth, looks, motion))
        facts = {"face": vars(voice.face) | {"light": round(light, 4)}}
        for name, tracks in {"mouth": dict(zip(MOUTH, mouth.T)), "pose": motion}.items():  # a number per frame
            facts[name] = {key: [round(float(value), 3) for value in track] for key, track in tracks.items()}
        return facts


def _describe(speech: Speech, text: str, voice: Voice, expression: str, intensity: float) -> dict:
    """Return the entries of the .json that clips of both versions have."""
    return {
        "text": text,
        "phonemes": speech.phonemes,
        "voice": voice.number,
        "expression": expression,
        "intensity": round(intensity, 4),
        "frames": speech.frames,
        "seconds": speech.frames / FPS,
    }


def is_done(root: Path, split: str, index: int, version: int) -> bool:
    """Return whether a clip is complete: its .json is written last."""
    stem = root / split / clip_id(split, index)
    suffixes = (".json", ".wav") if version == 3 else (".json", ".mp4", ".wav")
    return all(stem.with_suffix(suffix).is_file() for suffix in suffixes)


def write_wave(path: Path, wave: np.ndarray) -> None:
    """Write (N,) floats as mono 16-bit PCM."""
    content = io.BytesIO()
    with wave_file.open(content, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(np.clip(np.rint(wave * 32767), -32768, 32767).astype("<i2").tobytes())
    with atomic_output(path) as part:
        part.write_bytes(content.getvalue())


def write_video(path: Path, frames: np.ndarray) -> None:
    """Write (T, 128, 128, 3) uint8 RGB as H.264: one thread, without the time of the run or other metadata."""
    take = f"-f rawvideo -pix_fmt rgb24 -s {SIZE}x{SIZE} -r {FPS} -i - -an".split()
    code = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "18", "-pix_fmt", "yuv420p", "-threads", "1"]
    plain = ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-f", "mp4"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *take, *code, *plain]
    with atomic_output(path) as part:
        done = subprocess.run([*command, str(part)], input=frames.tobytes(), capture_output=True)
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().rsplit(": ", 1)[-1]
            raise OSError(reason or f"ffmpeg ended with {done.returncode}")
