"""Media files, releases, others' checkpoints, job lists: damaged, too large, silent, or not what their name says."""

import shutil
import zipfile
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import soundfile
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from engine.media.audio import read_audio, read_voice, write_wav
from engine.media.video import read_video
from engine.release import load_strict
from engine.settings import LIMITS, Limits, set_limits
from engine.torch_files import read_checkpoint, read_matrix
from engine.training.export import ReleaseInfo, write
from hicodit.conditions.avhubert import AVHubert
from hicodit.system import HiCoDiTSystem
from rvq_codec import RVQCodec
from talker_t2av.faces import read_picture
from talker_t2av.model import TalkerT2AV
from talker_t2av.settings import InferConfig, read_jobs
from talker_t2av.speaker.encoder import WavLMEncoder
from talker_t2av.system import TalkerSystem
from talker_t2av.text import TalkerTokenizer
from tests.hostile.rows_files import file
from tests.media_files import ffmpeg
from whisperx_vae import WhisperXVAE

ASSETS = Path(__file__).resolve().parents[2] / "assets"
CLIP = ASSETS / "demo" / "silent.mp4"
VOICE = ASSETS / "demo" / "voice.wav"
NAN = float("nan")


def read_video_with_a_jump(folder: Path) -> None:
    encode = ("-fps_mode", "passthrough", "-c:v", "libx264", "-preset", "ultrafast")
    ffmpeg("-i", CLIP, "-frames:v", 40, "-vf", "setpts='PTS+gt(N,20)*3600/TB'", *encode, folder / "clip.mp4")
    read_video(folder / "clip.mp4")


def read_limited(_: Path, limits: dict, read, path: Path) -> None:
    before = Limits(**vars(LIMITS))
    set_limits(Limits(**limits))
    try:
        read(path)
    finally:
        set_limits(before)


def read_sound(path: Path) -> None:
    read_audio(path, 16_000)


def read_half(folder: Path, source: Path, read) -> None:
    data = source.read_bytes()
    path = folder / f"half{source.suffix}"
    path.write_bytes(data[: len(data) // 2])
    read(path)


def read_half_as(folder: Path, suffix: str, read) -> None:
    """Read half of a file of another format, whose header states the size of the whole."""
    whole = folder / f"whole{suffix}"
    ffmpeg("-stream_loop", 3, "-i", CLIP, "-stream_loop", 3, "-i", VOICE, "-shortest", whole)
    read_half(folder, whole, read)


def read_samples(folder: Path, samples: list[float]) -> None:
    soundfile.write(folder / "a.wav", np.asarray(samples, np.float32), 16_000, subtype="FLOAT")
    read_voice(folder / "a.wav", 24_000)


def read_link_to_itself(folder: Path) -> None:
    (folder / "a.mp4").symlink_to(folder / "a.mp4")
    read_video(folder / "a.mp4")


def read_huge_picture(folder: Path) -> None:
    cv2.imwrite(str(folder / "a.png"), np.zeros((16_000, 16_000), np.uint8))
    read_picture(folder / "a.png")


def read_motion(path: Path) -> None:
    read_matrix(path, 4)


def read_job_list(path: Path) -> None:
    read_jobs(InferConfig(jobs=str(path), mode="tts", reference_audio="v.wav"))


def read_changed_release(folder: Path, release, change) -> None:
    """Read a copy of a bundled release after `change(copy)`."""
    name, read = release
    shutil.copytree(ASSETS / name, folder / name)
    change(folder / name)
    read(folder / name)


def set_in_config(folder: Path, key: str, value) -> None:
    config = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(config, key, value, force_add=True)
    OmegaConf.save(config, folder / "config.yaml")


def spoil_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state[next(key for key, tensor in state.items() if tensor.is_floating_point() and tensor.ndim > 1)].fill_(NAN)
    save_file(state, folder / "model.safetensors")


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:999])


def add_scale(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {"x::scale": torch.ones(3)}, folder / "model.safetensors")


def drop_scale(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    name = next(key for key in state if key.endswith("::scale"))
    save_file({key: tensor for key, tensor in state.items() if key != name}, folder / "model.safetensors")


def change_type(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    name = next(key for key, tensor in state.items() if tensor.dtype == torch.float16)
    save_file(state | {name: state[name].long()}, folder / "model.safetensors")


def write_template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)


def write_beyond_float16(folder: Path) -> None:
    write(folder / "out", ReleaseInfo("toy", {}, "net", "T", "A.", "x"), {"net.w": torch.tensor([1.0, 7e4])}, "", None)


HICODIT = ("hicodit_tiny", HiCoDiTSystem.from_pretrained)
TALKER = ("talker_t2av_real", TalkerT2AV.from_pretrained)
RVQ = ("rvq_speech", RVQCodec.from_pretrained)
TOKENIZER = ("talker_t2av_real", TalkerTokenizer.from_pretrained)

EXPANDED_MOTION = torch.zeros(1).expand(10**9, 4)
EXPANDED = {"state": torch.zeros(1).expand(10**6, 10**6)}  # a terabyte that is stored in four bytes

SOUNDS = {  # name: (samples, pattern of the error)
    "a gap": ([0.0, NAN, 0.0], "samples that are not finite, or above 100"),
    "no samples": ([], "has no audio samples"),
    "silent": ([0.0] * 16_000, "is silent"),
}
LIMITED = {  # name: (limits, reader, file, pattern of the error)
    "pixels": ({"pixels": 9999}, read_video, CLIP, "more than 9,999 pixels"),
    "video": ({"seconds": 1}, read_video, CLIP, "more than 1 s of video"),
    "sound": ({"seconds": 1}, read_sound, VOICE, "more than 1 s of audio"),
}
SETTINGS = [  # release, key and value in its config.yaml, pattern of the error
    (HICODIT, "model.low_blocks", 10**9, "must be from 0 to 1,048,576"),
    (RVQ, "surprise", 1, "config.yaml"),
    (TALKER, "motion.mean", [NAN], "must be a finite number"),
    (TALKER, "model.llm.vocab_size", 10**6, "far larger model"),
    (TALKER, "model.llm.attn_implementation", "evil/kernels", "llm.attn_implementation is not one of"),
]
RELEASES = {  # name: (release, change of its files, pattern of the error)
    "truncated weights": (RVQ, truncate_weights, "model.safetensors is damaged"),
    "scales without weights": (RVQ, add_scale, "x::scale does not match"),
    "8 bits without scales": (RVQ, drop_scale, "has no scales"),
    "integers instead of floats": (RVQ, change_type, "of torch.int64, the config requires torch.float32"),
    "NaN weights": (HICODIT, spoil_weight, "non-finite weights"),
    "a template that needs 100 GB": (
        TOKENIZER,
        partial(write_template, text="{{ 'x' * 99999999999 }}"),
        "chat template cannot be used .MemoryError",
    ),
    "a template that reaches classes": (
        TOKENIZER,
        partial(write_template, text="{{ ''.__class__.__mro__ }}"),
        "SecurityError",
    ),
}
JOBS = {  # content of a job list: pattern of the error
    '{"text": "a", "name": "../a"}': "without folders",
    '{"txt": "a"}': "unknown setting 'txt'",
    '{"text": "a", "reference_audio": "a\\u0000.wav"}': "null character",
    '{"text": "a"}\n{"text": "b", "name": "0001"}': "two jobs",
}
CASES = [
    *((f"sound: {k}", partial(read_samples, samples=v), line) for k, (v, line) in SOUNDS.items()),
    *(
        (f"limit: {k}", partial(read_limited, limits=limits, read=read, path=path), line)
        for k, (limits, read, path, line) in LIMITED.items()
    ),
    ("motion: not a number", file("m.pt", torch.full((3, 4), NAN), read_motion), "of finite numbers"),
    ("motion: a million times its data", file("m.pt", EXPANDED_MOTION, read_motion), "larger than its data"),
    *(
        (
            f"release: {key}={value}",
            partial(read_changed_release, release=release, change=partial(set_in_config, key=key, value=value)),
            line,
        )
        for release, key, value, line in SETTINGS
    ),
    *(
        (f"release: {k}", partial(read_changed_release, release=release, change=change), line)
        for k, (release, change, line) in RELEASES.items()
    ),
    *((f"job: {k[:50]}", file("jobs.jsonl", k, read_job_list), line) for k, line in JOBS.items()),
    ("half: mkv", partial(read_half_as, suffix=".mkv", read=read_video), "damaged: only the first"),
    ("half: mp3", partial(read_half_as, suffix=".mp3", read=read_sound), "ends after .* bytes that it states"),
    ("half: mp4, index last", partial(read_half, source=CLIP, read=read_video), "its index is missing|only the first"),
    ("half: wav", partial(read_half, source=VOICE, read=read_sound), "only the first .* of its audio"),
    ("release: a weight beyond float16", write_beyond_float16, "non-finite weights .w."),
    ("checkpoint: larger than its data", file("c.pt", EXPANDED, read_checkpoint), "larger than its data"),
    ("video: a text", file("a.mp4", b"hello\n" * 99, read_video), "is not a video or audio file that ffmpeg can read$"),
    ("video: a jump of an hour", read_video_with_a_jump, "damaged time stamps"),
    ("video: a link to itself", read_link_to_itself, "no such file"),
    ("video: a folder", read_video, "is a folder"),
    ("write: not a number", lambda folder: write_wav(folder / "a.wav", np.array([NAN]), 16_000), "not finite"),
    ("picture: 16k", read_huge_picture, "more than 67,108,864"),
]

TENSOR = {"a": torch.zeros(1)}
TRUNCATED = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.cut off"
FILES = [  # reader, file name, content (None: the file is missing), pattern of the error
    (AVHubert.from_pretrained, "a.pt", TRUNCATED, "not .*: create or download it"),
    (WavLMEncoder.from_pretrained, "a.pth", {"model": TENSOR}, "not a WavLM-ECAPA speaker encoder"),
    (WhisperXVAE.from_pretrained, "a.ckpt", [1, 2], "a list"),
    (TalkerSystem, "absent", None, "weights folder not found"),
]
STATES = [  # state_dict for a layer with a weight of shape (1, 2), pattern of the error
    (TENSOR | {"weight": torch.zeros(1, 2)}, "unexpected tensor 'a'"),
    ({"weight": torch.zeros(3, 2)}, r"shape \(3, 2\), .* \(1, 2\)"),
]


def torch_script(folder: Path) -> None:
    torch.save([1], folder / "a.ckpt")
    with zipfile.ZipFile(folder / "a.ckpt", "a") as archive:
        archive.writestr("archive/constants.pkl", b"")
    WhisperXVAE.from_pretrained(folder)


def two_checkpoints(folder: Path) -> None:
    for name in ("a.ckpt", "b.ckpt"):
        (folder / name).touch()
    WhisperXVAE.from_pretrained(folder)


def load_state(folder: Path, state: dict[str, torch.Tensor]) -> None:
    load_strict(torch.nn.Linear(2, 1, bias=False), state, "a.pt")


CASES += [
    *(
        (f"upstream: {name}, {number}", file(name, content, read), line)
        for number, (read, name, content, line) in enumerate(FILES)
    ),
    *((f"upstream: {line}", partial(load_state, state=state), line) for state, line in STATES),
    ("upstream: TorchScript", torch_script, "TorchScript"),
    ("upstream: two checkpoints", two_checkpoints, "contains 2 checkpoints"),
]
