"""Calls of the ffmpeg binary that imageio-ffmpeg includes."""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import soundfile

from engine.errors import UserError
from engine.files import report_os_errors
from engine.settings import LIMITS

# Only containers of video and audio: without a list, ffmpeg would follow playlists to other files or the network,
# and would play a .txt file as ANSI art.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,mxf,nut,rm,dv,ivf,h264,hevc,"
    "yuv4mpegpipe,wav,mp3,aac,ac3,flac,aiff,au,caf,amr,w64"
)
REPAIR = "use an undamaged copy, or cut out the intact part"
SHORT = 0.5  # tolerated difference between stated and decoded length of a damaged file, in seconds
THREADS = "4"  # number of decoder threads; each keeps several frames


def command(*arguments: str) -> list[str]:
    """Return the arguments of a quiet, non-interactive ffmpeg call."""
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-y", *arguments]


def source(path: str | Path, span: tuple[float, float] | None = None) -> list[str]:
    """Return ffmpeg's input arguments for a local media file, or for its part from `span[0]` to `span[1]` seconds.

    The `file:` prefix prevents names with a colon from being parsed as URLs.
    """
    allowed = ["-protocol_whitelist", "file,pipe", "-format_whitelist", FORMATS, "-max_pixels", str(LIMITS.pixels)]
    if span is not None:
        allowed += ["-ss", f"{span[0]:.6f}", "-t", f"{span[1] - span[0]:.6f}"]
    return [*allowed, "-threads", THREADS, "-i", f"file:{path}"]


def decoding(path: str | Path, span: tuple[float, float] | None = None) -> list[str]:
    """Return ffmpeg's arguments before those of the output, for decoding one stream of a file, or of its part `span`.

    Times of all streams have the same origin.
    """
    with open(path, "rb") as file:
        start = file.read(189)
    if not start[:1] == start[188:] == b"G":
        return source(path, span)
    # In MPEG-TS, seeking is not exact, and times begin with the first stream that is used. So the file is decoded from
    # its beginning, and all streams are used.
    arguments = [*source(path), "-map", "0:V?", "-map", "0:a?", "-c", "copy", "-f", "null", "-"]
    return arguments if span is None else [*arguments, "-ss", f"{span[0]:.6f}", "-t", f"{span[1] - span[0]:.6f}"]


def last_line(text: str) -> str:
    """Return the last line of ffmpeg's error output without its `[h264 @ 0x...]` prefix."""
    return (_messages(text) or ["no message"])[-1]


def first_line(text: str) -> str:
    """Return the first line of ffmpeg's error output, which states the cause of an encoder's errors."""
    return (_messages(text) or ["no message"])[0]


def _messages(text: str) -> list[str]:
    return [re.sub(r"^(\[[^\]]*\] )+", "", line) for line in text.splitlines() if line.strip()]


def errors_of(log: str) -> list[str]:
    """Return the error lines of ffmpeg's messages."""
    return [line for line in log.splitlines() if "[error]" in line or "[fatal]" in line]


def stated_seconds(log: str) -> float:
    """Return the length stated by a file in seconds, parsed from ffmpeg's messages; 0 if unknown."""
    stated = re.search(r"Duration: (\d+):(\d\d):(\d\d\.\d+)", log)
    return sum(float(n) * unit for n, unit in zip(stated.groups(), (3600, 60, 1))) if stated else 0.0


def check_whole(path: Path, kind: str, seconds: float, log: str, span: tuple[float, float] | None = None) -> None:
    """Raise UserError if ffmpeg reported errors and decoded less than the file, or its part `span`, states.

    Args:
        seconds: decoded length in seconds.
        log: ffmpeg's messages.
    """
    errors = errors_of(log)
    total = stated_seconds(log)
    if span is not None:
        total = min(total, span[1]) - span[0]
    if errors and seconds < total - SHORT:
        raise damaged(path, kind, seconds, total, last_line("\n".join(errors)))


def stated_bytes(path: Path) -> int:
    """Return the file size stated in the header of an AVI, AIFF, AU, ASF or MP3 file; 0 if unknown."""
    with path.open("rb") as file:
        head = file.read(4096)
        start = 0
        if head[:3] == b"ID3":  # the size has 7 bits per byte
            start = 10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0)))
            file.seek(start)
            head = file.read(4096)

    def number(offset: int, size: int, order: str) -> int:
        return int.from_bytes(head[offset : offset + size], order)

    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        total = number(4, 4, "little") + 8
    elif head[:4] == b"FORM":
        total = number(4, 4, "big") + 8
    elif head[:4] == b".snd":
        total = number(4, 4, "big") + number(8, 4, "big")
    elif head.startswith(_ASF) and (tag := head.find(_ASF_PROPERTIES)) > 0:
        return number(tag + 40, 8, "little")
    elif head[:1] == b"\xff" and 0 < (tag := max(head.find(b"Xing"), head.find(b"Info"))) < 64 and head[tag + 7] & 2:
        total = start + number(tag + (12 if head[tag + 7] & 1 else 8), 4, "big")
    else:
        return 0
    return total if total < 2**32 - 1 else 0  # all bits set: unknown


_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def check_complete(path: Path) -> None:
    """Raise UserError if the file is shorter than its header states."""
    size = path.stat().st_size
    stated = stated_bytes(path)
    if stated - size > max(4096, stated // 1000):
        raise UserError(f"{path} is damaged: it ends after {size:,} of the {stated:,} bytes that it states: {REPAIR}")


def damaged(path: Path, kind: str, seconds: float, total: float, why: str) -> UserError:
    """Return the error for a truncated or damaged file."""
    of = f" of {total:.1f}" if total else ""
    return UserError(
        f"{path} is damaged: only the first {seconds:.1f}{of} s of its {kind} can be decoded ({why}): {REPAIR}"
    )


def check_readable(path: str | Path) -> Path:
    """Return `path` as a Path of an existing, non-empty, readable file."""
    path = Path(path)
    with report_os_errors(f"cannot read {path}"):
        if path.is_dir():
            raise UserError(f"{path} is a folder, not a media file")
        if not path.is_file():
            raise UserError(f"no such file: {path}")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes)")
        path.open("rb").close()
    return path


def require_stream(path: str | Path, kind: str) -> None:
    """Check that a media file has a stream of `kind`, "video" or "audio", without decoding it."""
    path = check_readable(path)
    with suppress(soundfile.LibsndfileError):  # libsndfile reads some audio files that ffmpeg does not
        if kind == "audio" and soundfile.info(path):
            return
    stream_codec(path, kind)


def stream_codec(path: str | Path, kind: str) -> str:
    """Return the codec name of the first stream of `kind`, "video" or "audio"."""
    codec = getattr(probe(path), kind)
    if codec is None:
        raise UserError(f"{path} has no {kind} stream")
    return codec


@dataclass(frozen=True)
class Streams:
    """Codec names of the first video stream (excluding cover images) and audio stream; None if absent.

    Attributes:
        seconds: length stated by the file; 0 if unknown.
    """

    video: str | None
    audio: str | None
    seconds: float


PLAYABLE = {".mp4", ".m4v", ".mov", ".webm"}, {"h264", "vp8", "vp9", "av1"}  # containers and codecs of video


def browser_plays(path: str | Path) -> bool:
    """Return whether common browsers can play a video file; False if it is not a video."""
    containers, codecs = PLAYABLE
    try:
        return Path(path).suffix.lower() in containers and probe(path).video in codecs
    except UserError:
        return False


def probe(path: str | Path) -> Streams:
    """Return the streams of a media file."""
    path = check_readable(path)
    report = subprocess.run(command(*source(path)), capture_output=True, text=True, errors="replace").stderr
    lines = [line for line in report.splitlines() if re.match(r"\s*Stream #0:.*: (Video|Audio): ", line)]
    if not lines:
        with path.open("rb") as file:
            has_boxes = file.read(8)[4:] in (b"ftyp", b"mdat", b"free", b"wide", b"skip")  # of MP4 and MOV
        incomplete = has_boxes and "moov atom not found" in report
        note = " (its index is missing: the file is not complete)" if incomplete else ""
        raise UserError(f"{path} is not a video or audio file that ffmpeg can read{note}")
    video = [m[1] for line in lines if "(attached pic)" not in line and (m := re.search(r": Video: (\w+)", line))]
    audio = [m[1] for line in lines if (m := re.search(r": Audio: (\w+)", line))]
    return Streams(video[0] if video else None, audio[0] if audio else None, stated_seconds(report))
