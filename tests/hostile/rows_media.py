"""Rows of media, releases and jobs: files that are damaged, huge, silent, not finite, or not what their names say."""

from __future__ import annotations

import shutil
import subprocess
from functools import partial
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import soundfile
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from engine.config import load
from engine.media.audio import read_audio, read_voice, write_wav
from engine.media.video import read_video
from engine.settings import LIMITS, Limits, set_limits
from engine.torch_files import read_checkpoint, read_matrix
from engine.training.export import Release, write
from engine.training.settings import TrainerConfig
from hicodit.model import ModelConfig
from hicodit.system import HiCoDiTSystem
from rvq_codec import RVQCodec
from talker_t2av.faces import read_picture
from talker_t2av.jobs import Job
from talker_t2av.model import TalkerT2AV
from talker_t2av.request import Sampling
from talker_t2av.settings import InferConfig, read_jobs
from talker_t2av.system import MotionStats, TalkerSystem
from talker_t2av.text import TalkerTokenizer
from tests.engine.toy_task import CONFIG
from tests.hostile.rows_files import file

ASSETS = Path(__file__).resolve().parents[2] / "assets"
CLIP, VOICE = ASSETS / "demo" / "silent.mp4", ASSETS / "demo" / "voice.wav"


def ffmpeg(*arguments: object) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


def video(folder: Path, suffix: str, *filters: object) -> None:
    path = folder / f"clip{suffix}"
    encode = ("-fps_mode", "passthrough", "-c:v", "libx264", "-preset", "ultrafast")
    ffmpeg("-i", CLIP, "-frames:v", 40, "-vf", *filters, *encode, path)
    read_video(path)


def limited(folder: Path, limits: dict, call) -> None:
    before = Limits(**vars(LIMITS))
    set_limits(Limits(**limits))
    try:
        call(folder)
    finally:
        set_limits(before)


def cut(folder: Path, source: Path, share: float, read, tail: bytes = b"") -> None:
    data = source.read_bytes()
    path = folder / source.name
    path.write_bytes(data[: int(len(data) * share)] + tail)
    read(path)


def cut_fast(folder: Path, read) -> None:
    ffmpeg("-i", CLIP, "-i", VOICE, "-c:v", "libx264", "-c:a", "aac", "-movflags", "+faststart", folder / "fast.mp4")
    (folder / "cut").mkdir()
    cut(folder / "cut", folder / "fast.mp4", 0.5, read)


def cut_as(folder: Path, suffix: str, read, tail: bytes = b"") -> None:
    """Half of a file whose header states its size, and another tail."""
    ffmpeg("-stream_loop", 3, "-i", CLIP, "-stream_loop", 3, "-i", VOICE, "-shortest", folder / f"whole{suffix}")
    (folder / "cut").mkdir()
    cut(folder / "cut", folder / f"whole{suffix}", 0.5, read, tail)


def sound(folder: Path, samples, read=read_audio) -> None:
    soundfile.write(folder / "a.wav", np.asarray(samples, np.float32), 16_000, subtype="FLOAT")
    read(folder / "a.wav", 24_000)


def loop(folder: Path, name: str, read) -> None:
    (folder / name).symlink_to(folder / name)
    read(folder / name)


def release(folder: Path, name: str, change, load_it) -> None:
    """A copy of a bundled release, changed."""
    shutil.copytree(ASSETS / name, folder / name)
    change(folder / name)
    load_it(folder / name)


def setting(key: str, value, folder: Path) -> None:
    config = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(config, key, value, force_add=True)
    OmegaConf.save(config, folder / "config.yaml")


def weights(change, folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def spoil(value: float, state: dict) -> None:
    state[next(key for key, tensor in state.items() if tensor.is_floating_point() and tensor.ndim > 1)].fill_(value)


def template(text: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(text)


def motion_of(path: Path) -> None:
    read_matrix(path, 4)


def jobs_of(path: Path) -> None:
    read_jobs(InferConfig(jobs=str(path), mode="tts", reference_audio="v.wav"))


def command(folder: Path, config: str, words: str) -> None:
    load(config, words.split())


def released(folder: Path) -> None:
    write(folder / "out", Release("toy", {}, "net", "T", "A.", "x"), {"net.w": torch.tensor([1.0, 7e4])}, "", None)


HICODIT, TALKER, RVQ, SYSTEM, WORDS = (
    ("hicodit_tiny", HiCoDiTSystem.from_pretrained),
    ("talker_t2av_tiny", TalkerT2AV.from_pretrained),
    ("rvq_tiny", RVQCodec.from_pretrained),
    ("talker_t2av_tiny", TalkerSystem),
    ("talker_t2av_tiny", TalkerTokenizer.from_pretrained),
)
NAN, INF = float("nan"), float("inf")
HUGE = {"state": torch.zeros(1).expand(10**6, 10**6)}  # of four bytes
STATED, FIRST = "ends after .* of the .* bytes that it states", "only the first .* of its audio"


def sound_of(path: Path):
    return read_audio(path, 16_000)


MEDIA = {  # content of a file: what it is read with, and the line
    "a text": (b"hello\n" * 99, read_video, "is not a video or audio file that ffmpeg can read$"),
    "nothing": (b"", read_video, "is empty"),
}
SOUNDS = {  # samples, and the line
    "a gap": ([0.0, NAN, 0.0], "samples that are not finite, or above 100"),
    "no samples": ([], "has no audio samples"),
    "silent": ([0.0] * 16_000, "is silent"),
}
LIMITED = {  # limits, what is read, and the line
    "pixels": ({"pixels": 9999}, lambda _: read_video(CLIP), "more than 9,999 pixels"),
    "video": ({"seconds": 1}, lambda _: read_video(CLIP), "more than 1 s of video"),
    "sound": ({"seconds": 1}, lambda _: sound_of(VOICE), "more than 1 s of audio"),
}
MATRICES = {  # motion, and the line
    "not a number": (torch.full((3, 4), torch.nan), "of finite numbers"),
    "a dict": ({"a": 1}, "of finite numbers"),
    "a million times its data": (torch.zeros(1).expand(10**9, 4), "larger than its data"),
}
SETTINGS = [  # of a release's config.yaml: which release, key, value, and the line
    (HICODIT, "model.low_blocks", 200, "has no tensor"),
    (HICODIT, "model.low_blocks", 10**9, "must be from 0 to 1,048,576"),
    (HICODIT, "model.width", "wide", "config.yaml"),
    (RVQ, "surprise", 1, "config.yaml"),
    (TALKER, "model.llm.vocab_size", 10**6, "far larger model"),
    (TALKER, "model.llm.attn_implementation", "evil/kernels", "llm.attn_implementation is not one of"),
    (TALKER, "motion.mean", [NAN], "must be a finite number"),
    (SYSTEM, "motion.mean", ["x"], "config.yaml has no valid entry"),
]
WEIGHTS = {  # change of a release's tensors, and the line
    "scales alone": (lambda state: state.update({"x::scale": torch.ones(3)}), "x::scale does not match"),
}
TEMPLATES = {
    "{{ 'x' * 99999999999 }}": "chat template cannot be used .MemoryError",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
}
JOBS = {  # a line of a list of jobs, and what is said of it
    '{"text": "a", "name": "../a"}': "without folders",
    '{"text": "a", "reference_audio": "a\\u0000.wav"}': "null character",
    '{"text": "a", "seed": Infinity}': "seed=inf must be",
    '{"text": " "}': "requires text",
    '{"text": "a", "compat": "old"}': "compat=old",
    '{"text": "a", "max_seconds": 99}': "max_seconds=99",
    '{"mode": "v2a"}': "mode=v2a",
    '{"mode": "a2v", "audio": "x", "reference_video": "v.mp4", "compat": "official"}': "compat=official",
    '{"mode": "a2v", "audio": "x", "reference_video": "v.mp4", "reference_audio": null, "prefix_seconds": 1}': (
        "needs both"
    ),
    "[1]": "an object",
    '{"txt": "a"}': "unknown setting 'txt'",
    '{"text": "a"}\n{"text": "b", "name": "0001"}': "two jobs",
    "": "no line",
}
COMMANDS = [  # configuration, words, and the line
    ("infer_talker", "text=", "text= is empty: set a value, or omit it"),
]
VALUES = {  # what makes a value, and the line
    "statistics: not a number": (lambda: MotionStats(torch.tensor([NAN]), torch.ones(1)), "finite numbers"),
    "job: min_seconds": (lambda: Job("tts", "a", "v.wav", min_seconds=NAN), "min_seconds=nan must be"),
    "sampling: temperature": (lambda: Sampling(temperature=True), "temperature=True must be a number from 0.0 to 2.0"),
    "trainer: betas": (lambda: TrainerConfig(**CONFIG | {"betas": (0.1, 0.1, 0.1)}), "betas=.* must be two numbers"),
    "model: a switch of text": (lambda: ModelConfig(hierarchical="no"), "hierarchical=no must be true or false"),
    "limits": (lambda: Limits(seconds=NAN), "limits.seconds=nan must be"),
    "video: null byte": (lambda: read_video("a\0.mp4"), "no such file"),
    "jobs: no end": (lambda: read_jobs(InferConfig(jobs="/dev/zero", mode="tts")), "has more than 268,435,456 bytes"),
}


def jump(hours: int) -> str:
    return f"setpts='PTS+gt(N,20)*{hours * 3600}/TB'"


def changed(source, change) -> partial:
    return partial(release, name=source[0], change=change, load_it=source[1])


def bytes_of(data: bytes | int):
    """Replace the weights of a release by bytes, or keep so many of them."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:data] if isinstance(data, int) else data)

    return changed(RVQ, change)


CASES = [
    *((f"file: {k}", file("a.mp4", c, r), line) for k, (c, r, line) in MEDIA.items()),
    *((f"sound: {k}", partial(sound, samples=v, read=read_voice), line) for k, (v, line) in SOUNDS.items()),
    *((f"limit: {k}", partial(limited, limits=v, call=c), line) for k, (v, c, line) in LIMITED.items()),
    *((f"motion: {k}", file("m.pt", v, motion_of), line) for k, (v, line) in MATRICES.items()),
    *((f"release: {k}={v}", changed(of, partial(setting, k, v)), line) for of, k, v, line in SETTINGS),
    *((f"release: {k}", changed(RVQ, partial(weights, change)), line) for k, (change, line) in WEIGHTS.items()),
    *((f"template: {k}", changed(WORDS, partial(template, k)), line) for k, line in TEMPLATES.items()),
    *((f"job: {k[:50]}", file("jobs.jsonl", k, jobs_of), line) for k, line in JOBS.items()),
    *((f"command: {words}", partial(command, config=of, words=words), line) for of, words, line in COMMANDS),
    *((k, lambda _, make=make: make(), line) for k, (make, line) in VALUES.items()),
    *(
        (f"release: {of[0]} of {v}", changed(of, partial(weights, partial(spoil, v))), "non-finite weights")
        for of, v in ((HICODIT, NAN), (TALKER, INF))
    ),
    ("release: weights out of half precision", released, "non-finite weights .w."),
    ("release: cut", bytes_of(999), "model.safetensors is damaged"),
    ("checkpoint: larger than its data", file("c.pt", HUGE, read_checkpoint), "larger than its data"),
    ("video: 8k", lambda f: video(f, ".mp4", "scale=7680:4320,trim=end_frame=2"), "more than 16,777,216 pixels"),
    ("video: a jump of an hour", lambda f: video(f, ".mp4", jump(1)), "damaged time stamps"),
    ("video: cut", lambda f: cut(f, CLIP, 0.5, read_video), "its index is missing|only the first"),
    ("video: cut, index first", lambda f: cut_fast(f, read_video), "only the first"),
    ("video: cut, .mkv", lambda f: cut_as(f, ".mkv", read_video), "damaged: only the first"),
    ("video: a link to itself", lambda f: loop(f, "a.mp4", read_video), "no such file"),
    ("video: a folder", lambda f: read_video(f), "is a folder"),
    ("sound: cut", lambda f: cut(f, VOICE, 0.5, sound_of), FIRST),
    *(
        (f"sound: cut, {suffix}", partial(cut_as, suffix=suffix, read=sound_of), line)
        for suffix, line in (*((s, STATED) for s in (".mp3", ".avi", ".au")), (".flac", FIRST))
    ),
    ("write: not a number", lambda f: write_wav(f / "a.wav", np.array([NAN]), 16_000), "not finite"),
    (
        "picture: 16k",
        lambda f: (cv2.imwrite(str(f / "a.png"), np.zeros((16_000, 16_000), np.uint8)), read_picture(f / "a.png")),
        "more than 67,108,864",
    ),
]
