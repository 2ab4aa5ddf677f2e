"""What a report shows of a clip, small enough to stand in the page itself: sound, video, spectrogram, distributions."""

from __future__ import annotations

import base64
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import cv2
import numpy as np

from engine.media.audio import mel_picture, read_audio
from engine.media.ffmpeg import command, source

SECONDS = 20.0  # of a clip that are shown
VIDEO_SIDE = 224
RATE = 16_000
COLOURS = ("#2f6fde", "#d9662b", "#2a9d6f", "#9b51c4", "#c43d63", "#7a7a2c")
TRUE_COLOUR = "#7d8590"


def _url(content: Path | bytes, kind: str) -> str:
    content = content.read_bytes() if isinstance(content, Path) else content
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def player(audio: Path, video: Path | None) -> str:
    """An <audio> or <video> element that holds the first 20 s of the files; "" if ffmpeg cannot convert them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "clip.mp4"
        files = [*source(audio), *(source(video) if video else [])]
        sound = f"-t {SECONDS} -map 0:a:0 -ac 1 -c:a aac -b:a 48k -movflags +faststart".split()
        picture = f"-map 1:v:0 -vf scale=-2:{VIDEO_SIDE} -c:v libx264 -crf 28 -pix_fmt yuv420p".split()
        options = [*sound, *(picture if video else [])]
        done = subprocess.run(command("-v", "error", *files, *options, str(out)), capture_output=True)
        if done.returncode or not out.is_file():
            return ""
        if video:
            return f'<video controls preload="metadata" playsinline src="{_url(out, "video/mp4")}"></video>'
        return f'<audio controls preload="metadata" src="{_url(out, "audio/mp4")}"></audio>'


def spectrogram(path: Path) -> str:
    """An <img> with the log-mel spectrogram of a file's first 20 s, 80 dB from light to dark."""
    mel = mel_picture(read_audio(path, RATE)[: int(SECONDS * RATE)], RATE)[::-1]
    grey = (255 * np.clip((mel - mel.max() + 80) / 80, 0, 1)).astype(np.uint8)
    picture = cv2.resize(cv2.applyColorMap(grey, cv2.COLORMAP_MAGMA), (480, 120), interpolation=cv2.INTER_AREA)
    _, content = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 80])
    return f'<img alt="spectrogram" src="{_url(content.tobytes(), "image/jpeg")}">'


def distribution(values: Mapping[str, Sequence[float]], colours: Mapping[str, str], digits: int) -> str:
    """An <svg> with a row for each system: its clips as points, quartiles and median as a box."""
    every = np.concatenate([np.asarray(v, float) for v in values.values()])
    low, high = float(every.min()), float(every.max())
    span = (high - low) or 1.0
    width, left, row = 560, 8, 54
    height = row * len(values) + 26

    def at(value: float) -> float:
        return left + (value - low) / span * (width - 2 * left)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    rng = np.random.default_rng(0)
    for i, (name, own) in enumerate(values.items()):
        own, y, colour = np.asarray(own, float), 32 + row * i, colours[name]
        q1, middle, q3 = np.percentile(own, [25, 50, 75])
        parts.append(f'<text x="{left}" y="{y - 18}" class="name">{escape(name)}</text>')
        for value, shift in zip(own, rng.uniform(-9, 9, len(own))):
            place = f'cx="{at(value):.1f}" cy="{y + shift:.1f}" r="2.4"'
            parts.append(f'<circle {place} fill="{colour}" fill-opacity=".4"/>')
        parts.append(
            f'<rect x="{at(q1):.1f}" y="{y - 11}" width="{max(at(q3) - at(q1), 1):.1f}" height="22" fill="none" '
            f'stroke="{colour}" stroke-width="1.5"/><line x1="{at(middle):.1f}" x2="{at(middle):.1f}" y1="{y - 11}" '
            f'y2="{y + 11}" stroke="{colour}" stroke-width="3"/>'
        )
    for value, anchor in ((low, "start"), (low + span / 2, "middle"), (low + span, "end")):
        parts.append(
            f'<text x="{at(value):.1f}" y="{height - 6}" text-anchor="{anchor}" class="tick">{value:.{digits}f}</text>'
        )
    return "".join(parts) + "</svg>"
