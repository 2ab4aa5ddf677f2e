"""Video files as arrays of RGB frames.

Axes: T frames, H height, W width, N samples.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from engine.errors import UserError
from engine.files import atomic_output
from engine.media.audio import write_wav
from engine.media.ffmpeg import (
    REPAIR,
    check_complete,
    check_readable,
    check_whole,
    command,
    damaged,
    decoding,
    errors_of,
    first_line,
    last_line,
    source,
    stream_codec,
)
from engine.settings import LIMITS

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}


def read_video(path: str | Path, fps: float = 25.0, max_side: int | None = None) -> np.ndarray:
    """Read all frames of a video, resampled to `fps` by time stamps and with rotation applied.

    Args:
        path: a video file of any size and frame rate.
        fps: frames per second of the result; frames are repeated or dropped, never blended.
        max_side: the longer side is scaled down to at most this many pixels.

    Returns:
        (T, H, W, 3) uint8 RGB, T >= 1, square pixels.
    """
    return np.concatenate(list(iter_video(path, fps, max_side)))


BLOCK_BYTES = 64 * 2**20  # maximum bytes of a block of frames: 25 frames of 1280 x 720
LOG_BYTES = 2**16  # bytes of ffmpeg's messages that are searched for damaged time stamps


def iter_video(
    path: str | Path,
    fps: float = 25.0,
    max_side: int | None = None,
    block: int = 64,
    span: tuple[float, float] | None = None,
) -> Iterator[np.ndarray]:
    """Yield the frames of `read_video` in blocks of at most `block` frames and `BLOCK_BYTES`, in constant memory.

    `span` limits the frames to a start and end time in seconds; the part before is not decoded.

    Interlaced frames are deinterlaced. Frames whose size changes are scaled to the size of the first frame.
    """
    path = check_readable(path)
    check_complete(path)
    arguments = ["-map", "0:V:0", "-vf", ",".join(_filters(fps, max_side)), "-fps_mode", "passthrough"]
    arguments += ["-sws_flags", "bicubic+accurate_rnd+full_chroma_int+bitexact"]
    # PPM images state their size, which is not known in advance because of rotation and scaling.
    arguments += ["-c:v", "ppm", "-pix_fmt", "rgb24"]
    if span is not None:
        arguments += ["-frames:v", str(max(1, round((span[1] - span[0]) * fps)))]
    call = ["-v", "level+info", "-nostats", "-reinit_filter", "0", *decoding(path, span), *arguments]
    call = command(*call, "-f", "image2pipe", "pipe:1")
    count = 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(call, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        try:
            frames = None
            have = 0
            while (frame := _read_ppm(process.stdout)) is not None:
                if frames is None:
                    frames = np.empty((max(1, min(block, BLOCK_BYTES // frame.nbytes)), *frame.shape), np.uint8)
                frames[have] = frame
                have = have + 1
                count = count + 1
                if count > LIMITS.seconds * fps:
                    raise UserError(f"{path} has more than {LIMITS.seconds:g} s of video (limits.seconds): trim it")
                if have == len(frames):
                    _check_times(path, os.pread(log.fileno(), LOG_BYTES, 0))
                    yield frames
                    frames = None
                    have = 0
            code = process.wait()
            log.seek(0)
            _check_times(path, log.read(LOG_BYTES))
            log.seek(0)
            _check_decoded(path, code, log.read().decode(errors="replace"), count, fps, span)
            if have:
                yield frames[:have]
        finally:  # also when the caller stops early
            process.kill()
            process.stdout.close()
            process.wait()


def _filters(fps: float, max_side: int | None) -> list[str]:
    """Return ffmpeg's filters of `iter_video`, in order."""
    is_near = f"lte(t-if(isnan(prev_selected_t),0,prev_selected_t),{LIMITS.gap})"
    filters = [
        # Drops the frames after a gap in the time stamps and logs their times, see `_check_times`.
        f"select='if({is_near},1,0*print(t,16))'",
        # Scales frames of another size to that of the first frame. Without it and `-reinit_filter 0`, ffmpeg would
        # restart all filters at such a frame, at time zero.
        "scale=iw:ih",
        # Deinterlaces only frames that are marked as interlaced.
        "bwdif=mode=send_frame:deint=interlaced",
        # Repeats the first frame from time zero on if the video stream begins after the audio, so that frame and sample
        # indices share their origin.
        f"fps={fps!r}:start_time=0",
        # Makes pixels square.
        "scale=w='max(1,round(iw*clip(sar,0.25,4)))':h=ih",
        "setsar=1",
    ]
    if max_side is not None:
        filters.append(f"scale=w='min(iw,{max_side})':h='min(ih,{max_side})':force_original_aspect_ratio=decrease")
    return filters


def _check_times(path: Path, log: bytes) -> None:
    """Raise UserError if ffmpeg skipped frames after a gap in the time stamps, which it would fill with repeated
    frames.
    """
    if jump := re.search(rb"\[error\] (\d+\.\d+)\n", log):
        raise UserError(
            f"{path} has damaged time stamps: no frame for more than {LIMITS.gap:g} s (limits.gap) before the one "
            f"at {float(jump[1]):,.0f} s: {REPAIR}"
        )


def _check_decoded(
    path: Path, code: int, log: str, count: int, fps: float, span: tuple[float, float] | None = None
) -> None:
    """Raise UserError unless ffmpeg decoded the whole video. ffmpeg often exits with 0 on truncated files, so `log` is
    checked.
    """
    complaint = last_line("\n".join(errors_of(log)))
    if "exceeds specified max pixel count" in log:
        raise UserError(f"{path} has frames of more than {LIMITS.pixels:,} pixels (limits.pixels): scale it down")
    if count == 0:
        stream_codec(path, "video")
        raise UserError(f"{path} has no frames that can be decoded ({complaint})")
    check_whole(path, "video", count / fps, log, span)
    if code != 0:
        raise damaged(path, "video", count / fps, 0.0, complaint)


def write_video(
    path: str | Path,
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float,
    audio: np.ndarray | None = None,
    rate: int | None = None,
    lossless: bool = False,
    comment: str = "",
) -> None:
    """Write H.264 (yuv420p), with AAC audio if `audio` is given. The file is written atomically.

    Args:
        path: .mp4, .mov or .mkv.
        frames: (T, H, W, 3) uint8 RGB, or an iterable of (H, W, 3). An odd side is extended by repeating its last
            pixel, as 4:2:0 chroma needs even sides.
        fps: frames per second.
        audio: (N,) float mono in [-1, 1] at `rate` Hz.
        lossless: keep every RGB value, for videos that are measured. Some players do not support such files.
        comment: metadata, see `engine.media.audio.generated_comment`; none if empty.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise UserError(f"cannot write {path}: there are no frames")
    first = _even(first)
    height, width = first.shape[:2]
    with tempfile.TemporaryDirectory() as scratch, atomic_output(path) as staging, tempfile.TemporaryFile() as log:
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", repr(float(fps)), "-i", "pipe:0"]
        sound = _sound_arguments(audio, rate, Path(scratch))
        encode = [*(_LOSSLESS if lossless else _H264), *_comment(comment), "-f", _container(path), f"file:{staging}"]
        call = [word for word in command("-v", "error", *raw, *sound, *encode) if word != "-nostdin"]
        process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)
        try:
            process.stdin.write(first.tobytes())
            for frame in frames:
                frame = _even(frame)
                assert frame.shape == first.shape, f"frame {frame.shape} in a video of {first.shape}"
                process.stdin.write(frame.tobytes())
            process.stdin.close()
        except BrokenPipeError:
            pass  # ffmpeg ended early; its exit code and message are read below
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.wait() != 0:
            log.seek(0)
            raise UserError(f"cannot write {path}: {last_line(log.read().decode(errors='replace'))}")


def write_preview(video_path: str | Path, out_path: str | Path) -> None:
    """Write a copy of a video that browsers can play: an .mp4 of at most `limits.seconds` and 640 pixels.

    Raises:
        UserError: If the video cannot be decoded.
    """
    scale = "scale=w='min(iw,640)':h='min(ih,640)':force_original_aspect_ratio=decrease:force_divisible_by=2"
    streams = ["-map", "0:V:0", "-map", "0:a:0?", "-t", f"{LIMITS.seconds:g}"]
    encoding = ["-vf", f"bwdif=deint=interlaced,{scale}", *_H264, "-preset", "veryfast", "-c:a", "aac"]
    with atomic_output(out_path) as staging:
        call = command("-v", "error", *source(video_path), *streams, *encoding, "-f", "mp4", f"file:{staging}")
        result = subprocess.run(call, capture_output=True, text=True, errors="replace")
        if result.returncode != 0:
            raise UserError(f"{video_path} cannot be decoded: {last_line(result.stderr)}")


def mux_audio(video_path: str | Path, wave: np.ndarray, rate: int, out_path: str | Path, comment: str = "") -> None:
    """Write the video stream of `video_path` with new audio. H.264 is copied, other codecs are re-encoded. Audio is
    AAC.

    Args:
        wave: (N,) float mono in [-1, 1] at `rate` Hz, beginning at the video's time zero.
        out_path: .mp4, .mov or .mkv; may be `video_path` itself.
        comment: metadata, see `engine.media.audio.generated_comment`; none if empty.
    """
    choices = [["-vf", "scale='ceil(iw/2)*2':'ceil(ih/2)*2'", *_H264]]
    if stream_codec(video_path, "video") == "h264":  # re-encode if a copy fails, for example without time stamps
        choices.insert(0, ["-c:v", "copy", *_BITEXACT])
    with tempfile.TemporaryDirectory() as scratch:
        _join(out_path, [*source(video_path), *_sound_arguments(wave, rate, Path(scratch))], choices, comment)


COPIED = ("aac", "mp3", "flac", "alac", "ac3", "eac3", "opus")  # audio codecs that an .mp4 can copy


def join_audio(video_path: str | Path, audio_path: str | Path, out_path: str | Path, comment: str = "") -> None:
    """Write the video stream of one file with the audio of another, both lossless.

    Compressed audio is copied. PCM, as in WAV files, is encoded as FLAC, which is lossless for integers; floats are
    rounded to 24 bits and clipped at full scale.

    Args:
        video_path: file with a video stream that the container supports, such as H.264.
        out_path: .mp4, .mov or .mkv.
        comment: metadata, see `engine.media.audio.generated_comment`; none if empty.
    """
    stream_codec(video_path, "video")
    sound = stream_codec(audio_path, "audio")
    codec = ["-c:a", "copy"] if sound in COPIED else ["-c:a", "flac", "-compression_level", "5"]
    _join(out_path, [*source(video_path), *source(audio_path)], [["-c:v", "copy", *codec, *_BITEXACT]], comment)


def _join(out_path: str | Path, inputs: list[str], choices: list[list[str]], comment: str) -> None:
    """Write video and audio of two ffmpeg inputs with the first of several encodings that succeeds."""
    with atomic_output(out_path) as staging:
        streams = ["-map", "0:V:0", "-map", "1:a:0"]
        for choice in choices:
            encoding = [*choice, *_comment(comment), "-f", _container(out_path)]
            call = command("-v", "error", *inputs, *streams, *encoding, f"file:{staging}")
            result = subprocess.run(call, capture_output=True, text=True, errors="replace")
            if result.returncode == 0:
                return
        raise UserError(f"cannot write {out_path}: {first_line(result.stderr)}")


_BITEXACT = ["-fflags", "+bitexact", "-map_metadata", "-1", "-movflags", "+faststart"]
# One thread: x264's output depends on the thread count, and the same input should give the same bytes.
_LOSSLESS = ["-c:v", "libx264rgb", "-crf", "0", "-pix_fmt", "rgb24", "-threads", "1", *_BITEXACT]
_H264 = ["-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p", "-threads", "1", "-flags:v", "+bitexact", *_BITEXACT]


def _comment(comment: str) -> list[str]:
    return ["-metadata", f"comment={comment}"] if comment else []


def _container(path: str | Path) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in CONTAINERS:
        raise UserError(f"cannot write {path}: a video's name must end in {', '.join(CONTAINERS)}")
    return CONTAINERS[suffix]


def _sound_arguments(audio: np.ndarray | None, rate: int | None, scratch: Path) -> list[str]:
    if audio is None:
        return []
    assert rate is not None, "audio needs its rate"
    write_wav(scratch / "sound.wav", audio, rate)
    return ["-i", f"file:{scratch / 'sound.wav'}", "-c:a", "aac", "-b:a", "128k", "-flags:a", "+bitexact"]


def _even(frame: np.ndarray) -> np.ndarray:
    assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3, (frame.dtype, frame.shape)
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _read_ppm(stream: BinaryIO) -> np.ndarray | None:
    """Read the next image (H, W, 3) from a stream of binary PPM files. Return None at its end."""
    if stream.readline() != b"P6\n":
        return None
    width, height = map(int, stream.readline().split())
    stream.readline()  # skip the maximum value, 255
    data = stream.read(width * height * 3)
    return np.frombuffer(data, np.uint8).reshape(height, width, 3) if len(data) == width * height * 3 else None
