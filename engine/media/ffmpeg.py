"""Calling the ffmpeg binary that imageio-ffmpeg ships."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg

from engine.errors import UserError
from engine.media.limits import LIMITS

# Only containers of video and sound: without a list, ffmpeg would follow playlists to other files or the network,
# and would play a .txt file as ANSI art.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,mxf,nut,rm,dv,ivf,h264,hevc,"
    "yuv4mpegpipe,wav,mp3,aac,ac3,flac,aiff,au,caf,amr,w64"
)
SHORT = 0.5  # seconds by which a damaged file may fall short of the length that it states
THREADS = "4"  # of a decoder; each keeps several frames


def command(*arguments: str) -> list[str]:
    """The argument list of a quiet, non-interactive ffmpeg call."""
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-y", *arguments]


def source(path: str | Path) -> list[str]:
    """Input arguments for a local media file; the `file:` prefix keeps names with a colon from being read as URLs."""
    allowed = ["-protocol_whitelist", "file,pipe", "-format_whitelist", FORMATS, "-max_pixels", str(LIMITS.pixels)]
    return [*allowed, "-threads", THREADS, "-i", f"file:{path}"]


def last_line(text: str) -> str:
    """The last line of ffmpeg's complaint without its `[h264 @ 0x...]` prefix."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return re.sub(r"^(\[[^\]]*\] )+", "", lines[-1]) if lines else "no message"


def stated_seconds(log: str) -> float:
    """The length that a file states, out of ffmpeg's messages; 0 where it states none."""
    stated = re.search(r"Duration: (\d+):(\d\d):(\d\d\.\d+)", log)
    return sum(float(n) * unit for n, unit in zip(stated.groups(), (3600, 60, 1))) if stated else 0.0


def check_whole(path: Path, kind: str, seconds: float, log: str) -> None:
    """
    Raises:
        UserError: ffmpeg, which wrote `log`, met errors and decoded `seconds` only of the length that the file states.
    """
    errors = [line for line in log.splitlines() if "[error]" in line or "[fatal]" in line]
    total = stated_seconds(log)
    if errors and seconds < total - SHORT:
        raise damaged(path, kind, seconds, total, last_line("\n".join(errors)))


def damaged(path: Path, kind: str, seconds: float, total: float, why: str) -> UserError:
    """The error of a file that ends early."""
    of = f" of {total:.1f}" if total else ""
    return UserError(
        f"{path} is damaged: only the first {seconds:.1f}{of} s of its {kind} can be decoded ({why}): get a whole "
        "copy, or cut out the good part"
    )


def check_readable(path: str | Path) -> Path:
    """`path` as a Path of an existing, non-empty, readable file.

    Raises:
        UserError: no such file, a folder, an empty file, or no permission.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give a media file")
        if not path.is_file():
            raise UserError(f"no such file: {path}")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes)")
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return path


@dataclass(frozen=True)
class Streams:
    """Codec names of the first video stream (cover pictures do not count) and first audio stream; None: absent."""

    video: str | None
    audio: str | None


def probe(path: str | Path) -> Streams:
    """Which streams a media file has.

    Raises:
        UserError: the file is missing or is not a media file.
    """
    path = check_readable(path)
    report = subprocess.run(command(*source(path)), capture_output=True, text=True, errors="replace").stderr
    lines = [line for line in report.splitlines() if re.match(r"\s*Stream #0:.*: (Video|Audio): ", line)]
    if not lines:
        with path.open("rb") as file:
            has_boxes = file.read(8)[4:] in (b"ftyp", b"mdat", b"free", b"wide", b"skip")  # of MP4 and MOV
        incomplete = has_boxes and "moov atom not found" in report
        cut = " (its index is missing: the file is not complete)" if incomplete else ""
        raise UserError(f"{path} is not a video or audio file that ffmpeg can read{cut}")
    video = [m[1] for line in lines if "(attached pic)" not in line and (m := re.search(r": Video: (\w+)", line))]
    audio = [m[1] for line in lines if (m := re.search(r": Audio: (\w+)", line))]
    return Streams(video[0] if video else None, audio[0] if audio else None)
