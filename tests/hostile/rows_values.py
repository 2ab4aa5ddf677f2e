"""Settings, sizes and tensors that no function can use: each value is refused by name."""

from pathlib import Path

import numpy as np
import torch

from corpora.preparation.filters import Language, Transcription
from corpora.preparation.networks import Crops
from engine.arguments import check_port
from engine.device import as_device
from engine.faces.track import read_face, track_of_boxes
from engine.media.video import read_video
from engine.settings import check_place
from hicodit.conditions.types import check_identity
from hicodit.settings import InferConfig as HiCoDiTInferConfig
from hicodit.settings import find_clips
from lia_x import LiaXConfig
from rvq_codec import RVQCodec, RVQCodecConfig
from service.voices import Voices
from talker_t2av.jobs import Job
from talker_t2av.model import TalkerConfig
from talker_t2av.settings import InferConfig, read_jobs
from talker_t2av.system import MotionStats
from tests.tiny import RVQ

NAN = float("nan")


def codec() -> RVQCodec:
    return RVQCodec(RVQCodecConfig(**RVQ))


VALUES = {  # name: (what uses the value, pattern of the error)
    "a boolean as a number": (lambda: LiaXConfig(width=True), "width=True must be a whole number"),
    "not a number": (lambda: Job("tts", "a", "v.wav", min_seconds=NAN), "min_seconds=nan must be"),
    "statistics of motion": (lambda: MotionStats(torch.tensor([NAN]), torch.ones(1)), "finite numbers"),
    "sizes that do not fit together": (lambda: RVQCodec(RVQCodecConfig(ratios=(2, 2))), "hop of 4"),
    "a waveform without a channel": (lambda: codec().encode(torch.zeros(1, 51)), r"shape \(1, 51\)"),
    "a waveform in float64": (lambda: codec().encode(torch.zeros(1, 1, 960).double()), "float64: expected a float32"),
    "a waveform with NaN": (lambda: codec().encode(torch.full((1, 1, 960), NAN)), "not finite"),
    "codes in float32": (lambda: codec().decode(torch.zeros(1, 3, 3)), "float32 codes of shape"),
    "a voice that is not finite": (lambda: check_identity(np.full(256, NAN)), "expected a GE2E embedding"),
    "a voice that is a file": (lambda: check_identity("voice.wav"), "expected a GE2E embedding"),
    "a device that does not exist": (lambda: as_device("gpu"), "device=gpu is unknown"),
    "an unknown code": (lambda: codec().decode(torch.full((1, 3, 3), 16)), r"0\.\.15"),
    "video path with a null byte": (lambda: read_video("a\0.mp4"), "no such file"),
    "jobs from an endless file": (
        lambda: read_jobs(InferConfig(jobs="/dev/zero", mode="tts")),
        "has more than 268,435,456 bytes",
    ),
    "devices, a superscript": (lambda: check_place("processes", "²"), "must be a number from 1 to 64"),
    "ray workers without a GPU": (lambda: check_place("ray", "1", "auto", 0.0), "ray.gpus=0"),
    "text, half of a character": (lambda: Job("tts", "a \ud800", "v.wav"), "half of a surrogate pair"),
    "text, a null character": (lambda: Job("tts", "hi\0 there", "v.wav"), "null character"),
    "a window shorter than its hop": (lambda: RVQCodec(RVQCodecConfig(**RVQ | {"n_fft": 40})), "n_fft=40 .* larger"),
    "a window of an odd length": (lambda: RVQCodec(RVQCodecConfig(**RVQ | {"n_fft": 181})), "n_fft=181 .* even"),
    "no languages": (lambda: Language(None, []), "at least one language"),
    "a probability above 1": (lambda: Language(None, ["en"], 5), "min_probability=5 must be"),
    "a WER that is not a number": (lambda: Transcription(None, max_wer=NAN), "max_wer=nan must be"),
    "no face crops": (lambda: Crops(pictures=0), "stages.crops.pictures=0 must be"),
    "positions of a diffusion head": (lambda: TalkerConfig({}, context=3, max_positions=10), "at least 18"),
    "face boxes, a huge number": (lambda: track_of_boxes([10**400, 1, 2, 3], 3), "face_box="),
    "host, an empty label": (lambda: check_port("a..b", 8000), "--host a..b is not the name of a host"),
    "face, five thousand digits": (lambda: read_face("9" * 5000), "is unknown: choose largest"),
}


def find_voice(folder: Path) -> None:
    Voices(None, folder).find("a/../../../b")


def write_over_a_folder(folder: Path) -> None:
    """Request the track of the face where a folder has the name of an output file."""
    (folder / "a.mp4").write_bytes(b"x")
    (folder / "out" / "a_face.json").mkdir(parents=True)
    find_clips(HiCoDiTInferConfig(input=str(folder / "a.mp4"), output=str(folder / "out"), debug=True))


CASES = [
    *((f"value: {name}", lambda _, call=call: call(), line) for name, (call, line) in VALUES.items()),
    ("voice: a path", find_voice, "is unknown; available: none"),
    ("output: a name that a folder has", write_over_a_folder, "cannot write .*a_face.json: it is a folder"),
]
