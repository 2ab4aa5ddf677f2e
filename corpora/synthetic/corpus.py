"""Clips of the corpus: each is a function of (seed, split, index) alone, whatever process makes it, in any order."""

from __future__ import annotations

import io
import json
import math
import subprocess
import wave as wave_file
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np

from corpora.synthetic.expression import draw_expression, pose, prosody
from corpora.synthetic.face import Face, Motion, draw_motion
from corpora.synthetic.portrait import SIZE, design
from corpora.synthetic.sentences import SPLITS, draw_sentence
from corpora.synthetic.speech import Synthesizer
from corpora.synthetic.visemes import FPS, MOUTH, mouth_track
from corpora.synthetic.voices import Voice, load_voices
from engine.files import atomic_output

VERSION = 1
RATE = 24_000
FRAME = RATE // FPS  # samples a frame
_WORDS_PER_MINUTE = 150
_LEVEL = 10 ** (-25 / 20)  # RMS of neutral speech
_ROOM_TONE = 1e-3  # RMS; recognisers misread digital silence


def speak(
    synthesizer: Synthesizer, text: str, voice: Voice, expression: str, intensity: float, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
    """Speech at 24 kHz, (frames * 960,) float32, with about 0.15 s of room tone at both ends, and its phonemes."""
    style = prosody(expression, intensity)
    pitch, span, speed, gain, lead, tail = rng.normal(0, 1, 4).tolist() + rng.uniform(0.11, 0.19, 2).tolist()
    said = synthesizer.speak(
        text,
        voice.name,
        pitch=int(np.clip(round(style.pitch + 1.5 * pitch), 0, 99)),
        span=int(np.clip(round(style.span + 2 * span), 0, 99)),
        words_per_minute=round(_WORDS_PER_MINUTE * style.speed * (1 + 0.02 * np.clip(speed, -2, 2))),
    )
    level = _LEVEL * 10 ** ((style.gain + 0.4 * gain) / 20)
    speech = resample(said.wave, said.rate, RATE)
    speech *= level / max(1e-6, float(np.sqrt(np.mean(speech**2))))
    speech *= min(1.0, 0.97 / float(np.abs(speech).max()))
    start = int(lead * RATE)
    frames = math.ceil((start + len(speech) + tail * RATE) / FRAME)
    wave = rng.normal(0, _ROOM_TONE, frames * FRAME).astype(np.float32)
    wave[start : start + len(speech)] += speech
    shift = start / RATE
    return wave, [(symbol, round(a + shift, 4), round(b + shift, 4)) for symbol, a, b in said.phonemes]


def resample(wave: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Band-limited resampling of a clip that begins and ends in silence, through its spectrum."""
    step = math.gcd(rate, to)
    size = math.ceil((len(wave) + rate // 50) / (rate // step)) * (rate // step)
    length = size * to // rate
    spectrum = np.fft.rfft(wave.astype(np.float64), size)
    bins = np.zeros(length // 2 + 1, complex)
    count = min(len(spectrum), len(bins))
    bins[:count] = spectrum[:count]
    return (np.fft.irfft(bins, length) * (length / size)).astype(np.float32)[: math.ceil(len(wave) * to / rate)]


def loudness(wave: np.ndarray) -> np.ndarray:
    """Smooth loudness of each frame, (T,), 0 to 1."""
    level = np.sqrt(np.mean(wave.reshape(-1, FRAME) ** 2, 1))
    level = np.convolve(np.pad(level, 3, mode="edge"), np.hanning(9)[1:-1] / 4, "valid")
    return level / max(1e-6, level.max())


def pose_tracks(motion: Motion) -> dict[str, list[float]]:
    """Head and eye motion by name, one number a frame: pixels, degrees, shares; see `Motion`."""
    x, y = motion.shift.T
    gaze_x, gaze_y = motion.gaze.T
    tracks = {"shift_x": x, "shift_y": y, "turn": motion.turn, "blink": motion.blink}
    tracks |= {"gaze_x": gaze_x, "gaze_y": gaze_y, "brow": motion.brow}
    return {name: [round(float(value), 3) for value in values] for name, values in tracks.items()}


def clip_id(split: str, index: int) -> str:
    return f"{split}_{index:06d}"


class ClipMaker:
    """Makes clips under `root`; one for a process."""

    def __init__(self, root: Path, seed: int) -> None:
        cv2.setNumThreads(1)
        self._root, self._seed = root, seed
        voices = load_voices()
        known = [voice for voice in voices if not voice.held_out]
        self._voices = {"train": known, "seen": known, "unseen": [voice for voice in voices if voice.held_out]}
        self._synthesizer = Synthesizer({voice.name: voice.lines for voice in voices})

    def make(self, split: str, index: int) -> dict:
        """Write the clip's .mp4, .wav and, last, .json; return what the .json says."""
        rng = np.random.default_rng([self._seed, SPLITS.index(split), index])
        voices = self._voices[split]
        voice = voices[index % len(voices)]
        text = draw_sentence(rng, split)
        expression, intensity = draw_expression(rng)
        wave, phonemes = speak(self._synthesizer, text, voice, expression, intensity, rng)
        frames = len(wave) // FRAME
        light = float(rng.uniform(0.93, 1.07))
        mouth = mouth_track(phonemes, frames)
        mouth[:, MOUTH.index("open")] *= rng.uniform(0.93, 1.05)
        motion = draw_motion(rng, frames, loudness(wave))
        who = design(voice.face_seed, voice.pitch, voice.formants)
        video = Face(who, light).render(mouth, pose(expression, intensity), motion)
        name = clip_id(split, index)
        entry = {
            "id": name,
            "split": split,
            "text": text,
            "phonemes": phonemes,
            "voice": voice.number,
            "expression": expression,
            "intensity": round(intensity, 4),
            "frames": frames,
            "seconds": frames / FPS,
            "face": vars(who) | {"light": round(light, 4)},
            "mouth": {key: [round(float(v), 3) for v in column] for key, column in zip(MOUTH, mouth.T)},
            "pose": pose_tracks(motion),
            "seed": self._seed,
        }
        folder = self._root / split
        write_video(folder / f"{name}.mp4", video)
        write_wave(folder / f"{name}.wav", wave)
        write_text(folder / f"{name}.json", json.dumps(entry))
        return entry


def is_done(root: Path, split: str, index: int) -> bool:
    """Whether a clip is complete: its .json is written last."""
    stem = root / split / clip_id(split, index)
    return all(stem.with_suffix(suffix).is_file() for suffix in (".json", ".mp4", ".wav"))


def write_text(path: Path, text: str) -> None:
    with atomic_output(path) as part:
        part.write_text(text)


def write_wave(path: Path, wave: np.ndarray) -> None:
    """(N,) float to mono 16-bit PCM."""
    content = io.BytesIO()
    with wave_file.open(content, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(np.clip(np.rint(wave * 32767), -32768, 32767).astype("<i2").tobytes())
    with atomic_output(path) as part:
        part.write_bytes(content.getvalue())


def write_video(path: Path, frames: np.ndarray) -> None:
    """(T, 128, 128, 3) uint8 RGB to H.264, one thread, no time stamps or other traces of the run."""
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-y",
        "-loglevel",
        "error",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{SIZE}x{SIZE}",
        "-r",
        str(FPS),
        "-i",
        "-",
        "-an",
        "-c:v",
        "libx264",
        "-preset",
        "veryfast",
        "-crf",
        "18",
        "-pix_fmt",
        "yuv420p",
        "-threads",
        "1",
        "-fflags",
        "+bitexact",
        "-flags:v",
        "+bitexact",
        "-f",
        "mp4",
    ]
    with atomic_output(path) as part:
        done = subprocess.run([*command, str(part)], input=frames.tobytes(), capture_output=True)
        if done.returncode:
            raise OSError(done.stderr.decode(errors="replace").strip() or f"ffmpeg ended with {done.returncode}")
