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

from corpora.preparation.media import Decode
from engine.config import CONFIGS, load
from engine.faces.track import read_boxes
from engine.media.audio import read_audio, read_voice, write_wav
from engine.media.ffmpeg import probe
from engine.media.limits import LIMITS, Limits, set_limits
from engine.media.video import read_video
from engine.safe_pickle import read_checkpoint, read_matrix
from engine.settings import require_range
from engine.training.export import Release, write
from hicodit.settings import find_clips
from hicodit.system import HiCoDiTSystem
from rvq_codec import RVQCodec
from talker_t2av.faces import read_picture
from talker_t2av.jobs import Job
from talker_t2av.model import TalkerT2AV
from talker_t2av.motion import MotionStats
from talker_t2av.settings import InferConfig, read_jobs
from talker_t2av.system import TalkerSystem
from talker_t2av.text import TalkerTokenizer

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


def cut(folder: Path, source: Path, share: float, read) -> None:
    data = source.read_bytes()
    path = folder / source.name
    path.write_bytes(data[: int(len(data) * share)])
    read(path)


def cut_fast(folder: Path, read) -> None:
    ffmpeg("-i", CLIP, "-i", VOICE, "-c:v", "libx264", "-c:a", "aac", "-movflags", "+faststart", folder / "fast.mp4")
    (folder / "cut").mkdir()
    cut(folder / "cut", folder / "fast.mp4", 0.5, read)


def cut_as(folder: Path, suffix: str, read) -> None:
    """Half of a file whose header states its size."""
    ffmpeg("-stream_loop", 3, "-i", CLIP, "-stream_loop", 3, "-i", VOICE, "-shortest", folder / f"whole{suffix}")
    (folder / "cut").mkdir()
    cut(folder / "cut", folder / f"whole{suffix}", 0.5, read)


def sound(folder: Path, samples, read=read_audio) -> None:
    soundfile.write(folder / "a.wav", np.asarray(samples, np.float32), 16_000, subtype="FLOAT")
    read(folder / "a.wav", 24_000)


def named(folder: Path, name: str, content: bytes, read) -> None:
    (folder / name).write_bytes(content)
    read(folder / name)


def loop(folder: Path, name: str, read) -> None:
    (folder / name).symlink_to(folder / name)
    read(folder / name)


def matrix(folder: Path, value) -> None:
    torch.save(value, folder / "m.pt")
    read_matrix(folder / "m.pt", 4)


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


def job(folder: Path, line: str, **settings) -> None:
    (folder / "jobs.jsonl").write_text(line, encoding="utf-8")
    read_jobs(InferConfig(jobs=str(folder / "jobs.jsonl"), **{"mode": "tts", "reference_audio": "v.wav", **settings}))


def command(folder: Path, config: str, *words: str) -> None:
    load(config, words, "", CONFIGS)


def released(folder: Path) -> None:
    write(folder / "out", Release("toy", {}, "net", "T", "A.", "x"), {"net.w": torch.tensor([1.0, 7e4])}, "", None)


def expanded(folder: Path) -> None:
    torch.save({"state": torch.zeros(1).expand(10**6, 10**6)}, folder / "c.pt")
    read_checkpoint(folder / "c.pt")


NOT_SOUND = "samples that are not finite, or above 100"
JUMP = "'PTS+gt(N,20)*{}/TB'"
HICODIT, TALKER, RVQ = (
    ("hicodit_tiny", HiCoDiTSystem.from_pretrained),
    ("talker_t2av_tiny", TalkerT2AV.from_pretrained),
    ("rvq_tiny", RVQCodec.from_pretrained),
)


def changed(source, change) -> partial:
    return partial(release, name=source[0], change=change, load_it=source[1])


CASES = [
    ("video: 8k", lambda f: video(f, ".mp4", "scale=7680:4320,trim=end_frame=2"), "more than 16,777,216 pixels"),
    ("video: limit set", lambda f: limited(f, {"pixels": 9999}, lambda _: read_video(CLIP)), "more than 9,999 pixels"),
    *(
        (
            f"video: a jump of {hours} h, {suffix}",
            lambda f, h=hours, s=suffix: video(f, s, f"setpts={JUMP.format(h * 3600)}"),
            "damaged time stamps",
        )
        for hours in (1, 27)
        for suffix in (".mp4", ".mkv")
    ),
    ("video: too long", lambda f: limited(f, {"seconds": 1}, lambda _: read_video(CLIP)), "more than 1 s of video"),
    (
        "video: text",
        lambda f: named(f, "a.mp4", b"hello\n" * 99, read_video),
        "is not a video or audio file that ffmpeg can read$",
    ),
    ("video: empty", lambda f: named(f, "a.mp4", b"", read_video), "is empty"),
    ("video: a playlist", lambda f: named(f, "a.mp4", b"#EXTM3U\nfile:///etc/passwd\n", read_video), "is not a video"),
    ("video: cut", lambda f: cut(f, CLIP, 0.5, read_video), "its index is missing|only the first"),
    ("video: cut, index first", lambda f: cut_fast(f, read_video), "only the first .* of its picture"),
    ("video: a link to itself", lambda f: loop(f, "a.mp4", read_video), "no such file"),
    ("video: null byte", lambda f: read_video("a\0.mp4"), "no such file"),
    ("video: a folder", lambda f: read_video(f), "is a folder"),
    ("probe: random bytes", lambda f: named(f, "a.mp4", bytes(range(256)) * 9, probe), "is not a video"),
    ("clips: a link to itself", lambda f: loop(f, "a.mp4", lambda path: find_clips(path, f)), "no such file or folder"),
    ("sound: not a number", lambda f: sound(f, [0.0, np.nan, 0.0]), NOT_SOUND),
    ("sound: infinite", lambda f: sound(f, [0.0, np.inf, 0.0]), NOT_SOUND),
    ("sound: 1e30", lambda f: sound(f, [1e30] * 99), NOT_SOUND),
    ("sound: no samples", lambda f: sound(f, []), "has zero audio samples"),
    (
        "sound: too long",
        lambda f: limited(f, {"seconds": 1}, lambda _: read_audio(VOICE, 16_000)),
        "more than 1 s of sound",
    ),
    (
        "sound: cut",
        lambda f: cut(f, VOICE, 0.5, lambda path: read_audio(path, 16_000)),
        "only the first .* of its sound",
    ),
    (
        "sound: cut, in MP4",
        lambda f: cut_fast(f, lambda path: read_audio(path, 16_000)),
        "only the first .* of its sound",
    ),
    *(
        (f"sound: cut, {suffix}", lambda f, s=suffix: cut_as(f, s, lambda path: read_audio(path, 16_000)), line)
        for suffix, line in (
            (".mp3", "ends after .* of the .* bytes that it states"),
            (".avi", "ends after .* of the .* bytes that it states"),
            (".wma", "ends after .* of the .* bytes that it states"),
            (".aiff", "ends after .* of the .* bytes that it states"),
            (".au", "ends after .* of the .* bytes that it states"),
            (".flac", "only the first .* of its sound"),
            (".mkv", "only the first .* of its sound"),
        )
    ),
    ("video: cut, .avi", lambda f: cut_as(f, ".avi", read_video), "ends after .* of the .* bytes that it states"),
    ("voice: silent", lambda f: sound(f, [0.0] * 16_000, read_voice), "is silent"),
    ("write: not a number", lambda f: write_wav(f / "a.wav", np.array([np.nan]), 16_000), "not finite"),
    (
        "picture: 16k",
        lambda f: (cv2.imwrite(str(f / "a.png"), np.zeros((16_000, 16_000), np.uint8)), read_picture(f / "a.png")),
        "more than 67,108,864",
    ),
    ("picture: text", lambda f: named(f, "a.png", b"hello", read_picture), "cannot be read as a picture"),
    ("motion: not a number", lambda f: matrix(f, torch.full((3, 4), torch.nan)), "of finite numbers"),
    ("motion: sparse", lambda f: matrix(f, torch.eye(4).to_sparse()), "of finite numbers"),
    ("motion: a dict", lambda f: matrix(f, {"a": 1}), "of finite numbers"),
    ("motion: whole numbers", lambda f: matrix(f, torch.ones(3, 4, dtype=torch.int64)), "of finite numbers"),
    ("motion: no rows", lambda f: matrix(f, torch.zeros(0, 4)), "of finite numbers"),
    ("motion: a million times its data", lambda f: matrix(f, torch.zeros(1).expand(10**9, 4)), "larger than its data"),
    ("motion: an object", lambda f: matrix(f, Path("x")), "it is damaged, or holds more than tensors"),
    ("checkpoint: larger than its data", expanded, "larger than its data"),
    ("boxes: deep", lambda f: named(f, "b.json", b"[" * 10**5, lambda path: read_boxes(str(path))), "nested too deep"),
    ("statistics: not a number", lambda f: MotionStats(torch.tensor([torch.nan]), torch.ones(1)), "finite numbers"),
    ("statistics: below 0", lambda f: MotionStats(torch.ones(1), -torch.ones(1)), "not below 0"),
    ("decode: min_seconds", lambda f: Decode(min_seconds=float("nan")), "min_seconds=nan must be a number"),
    ("decode: max_side", lambda f: Decode(max_side=10**6), "max_side=1000000 must be"),
    # releases
    *(
        (
            f"release: {name} of {value}",
            changed(of, partial(weights, partial(spoil, value))),
            "weights that are not finite",
        )
        for name, of in (("HiCoDiT", HICODIT), ("Talker", TALKER), ("RVQ", RVQ))
        for value in (float("nan"), float("inf"))
    ),
    ("release: weights out of half precision", released, "weights that are not finite numbers .w."),
    ("release: too many layers", changed(HICODIT, partial(setting, "model.low_blocks", 200)), "lacks tensor"),
    ("release: a million layers", changed(HICODIT, partial(setting, "model.low_blocks", 10**6)), "from 1 to 256"),
    ("release: wide", changed(HICODIT, partial(setting, "model.cond_dim", 10**6)), "from 1 to 65,536"),
    ("release: negative", changed(RVQ, partial(setting, "vocos_layers", -1)), "vocos_layers=-1 must be from 0"),
    (
        "release: a billion layers",
        changed(HICODIT, partial(setting, "model.low_blocks", 10**9)),
        "must be from 0 to 1,048,576",
    ),
    ("release: a million words", changed(TALKER, partial(setting, "model.llm.vocab_size", 10**6)), "far larger model"),
    (
        "release: a million decoders",
        changed(TALKER, partial(setting, "model.llm.num_hidden_layers", 10**6)),
        "num_hidden_layers=1000000 must be a whole number from 1 to 256",
    ),
    ("release: wide codec", changed(RVQ, partial(setting, "latent_channels", 10**6)), "from 1 to 16,384"),
    ("release: ratios", changed(RVQ, partial(setting, "ratios", [0, 4])), "ratios=0 must be"),
    ("release: delay", changed(TALKER, partial(setting, "model.delay", -5)), "delay=-5 must be"),
    ("release: patch_size", changed(TALKER, partial(setting, "model.patch_size", 0)), "patch_size=0 must be"),
    (
        "release: code of the hub",
        changed(TALKER, partial(setting, "model.llm.attn_implementation", "evil/kernels")),
        "llm.attn_implementation is not one of",
    ),
    (
        "release: not a number",
        changed(TALKER, partial(setting, "motion.mean", [float("nan")])),
        "must be a finite number",
    ),
    *(
        (
            f"release: statistics of {value}",
            changed(("talker_t2av_tiny", TalkerSystem.load), partial(setting, "motion.mean", [value])),
            "config.yaml lacks or misspells",
        )
        for value in ("x", None)
    ),
    ("release: text for a size", changed(HICODIT, partial(setting, "model.width", "wide")), "config.yaml"),
    ("release: no heads", changed(HICODIT, partial(setting, "model.heads", 0)), "config.yaml"),
    ("release: unknown field", changed(RVQ, partial(setting, "surprise", 1)), "config.yaml"),
    (
        "release: scales alone",
        changed(RVQ, partial(weights, lambda state: state.update({"x::scale": torch.ones(3)}))),
        "x::scale does not go with",
    ),
    (
        "release: scales of another shape",
        changed(RVQ, partial(weights, lambda s: s.update({f"{min(s)}::scale": torch.ones(7, 7)}))),
        "::scale does not go with",
    ),
    (
        "release: cut",
        changed(RVQ, lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:999])),
        "model.safetensors is damaged",
    ),
    (
        "release: one giant header",
        changed(RVQ, lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64)),
        "model.safetensors is damaged",
    ),
    (
        "tokenizer: a template without memory",
        partial(
            release,
            name=TALKER[0],
            change=partial(template, "{{ 'x' * 99999999999 }}"),
            load_it=TalkerTokenizer.from_pretrained,
        ),
        "chat template cannot be used .MemoryError",
    ),
    (
        "tokenizer: a template that reaches out",
        partial(
            release,
            name=TALKER[0],
            change=partial(template, "{{ ''.__class__.__mro__ }}"),
            load_it=TalkerTokenizer.from_pretrained,
        ),
        "SecurityError",
    ),
    # jobs and settings
    ("job: null name", lambda f: job(f, '{"text": "a", "name": null}'), "name= 'None' must be a file name"),
    ("job: name of folders", lambda f: job(f, '{"text": "a", "name": "../a"}'), "without folders"),
    ("job: null byte", lambda f: job(f, '{"text": "a", "reference_audio": "a\\u0000.wav"}'), "null character"),
    ("job: deep", lambda f: job(f, "[" * 10**5), "nested too deep"),
    ("job: infinite seed", lambda f: job(f, '{"text": "a", "seed": Infinity}'), "seed=inf must be"),
    (
        "job: seed of 2^70",
        lambda f: job(f, '{"text": "a", "seed": 1180591620717411303424}'),
        "seed=1180591620717411303424 must be",
    ),
    ("job: seed of -1", lambda f: job(f, '{"text": "a", "seed": -1}'), "seed=-1 must be"),
    ("job: empty file name", lambda f: job(f, '{"text": "a", "reference_audio": ""}'), "reference_audio= is empty"),
    ("job: number for a file", lambda f: job(f, '{"text": "a", "reference_audio": 7}'), "must be a text"),
    ("job: empty text", lambda f: job(f, '{"text": ""}'), "needs text"),
    ("job: min_seconds", lambda f: Job("tts", "a", "v.wav", min_seconds=float("nan")), "min_seconds=nan must be"),
    ("job: max_seconds", lambda f: Job("tts", "a", "v.wav", max_seconds=1e9), "max_seconds=1000000000.0 must be"),
    ("jobs: no end", lambda f: read_jobs(InferConfig(jobs="/dev/zero", mode="tts")), "has more than 268,435,456 bytes"),
    ("jobs: no text", lambda f: named(f, "j", b"\xff", lambda p: read_jobs(InferConfig(jobs=str(p)))), "invalid start"),
    ("jobs: a folder", lambda f: read_jobs(InferConfig(jobs=str(f))), "cannot be read: Is a directory"),
    ("command: text=", lambda f: command(f, "infer_talker", "text="), "text= is empty: give a value, or leave it out"),
    ("command: input=", lambda f: command(f, "infer", "input="), "input= is empty"),
    ("command: input=''", lambda f: command(f, "infer", "input=''"), "input= is empty"),
    ("command: weights=", lambda f: command(f, "infer", "weights="), "weights= is empty"),
    ("command: init=", lambda f: command(f, "train", "experiment=hicodit_synthetic", "init="), "init= is empty"),
    ("limits: not a number", lambda f: Limits(seconds=float("nan")), "limits.seconds=nan must be"),
    ("batch size", lambda f: require_range("batch_size", 0, 1, 1024), "batch_size=0 must be"),
]
