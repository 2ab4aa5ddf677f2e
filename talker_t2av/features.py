"""What Talker-T2AV trains on, made once a clip: speech latents, motion codes and the voice.

ROOT/talker/SPLIT/ID.safetensors: speech (T, 32), motion (T, 40) as the codec gives it, speaker (256,), all float16; the
file's metadata hold, by tensor, the digest of the weights that made it. ROOT/talker/stats.json: the mean and standard
deviation of each motion channel over the training split, the digests, and the clips that had to be left out.

Axes: B clips of one batch, T latent frames (25 a second), N samples.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.codec import Codec, PortraitCodec
from engine.errors import UserError
from engine.files import atomic_output
from engine.media.audio import read_audio, resample
from engine.media.corpus import read_manifest
from engine.media.pictures import video_to_tensor
from engine.media.video import read_video
from engine.nn.mel import RATE
from talker_t2av.speaker.encoder import VoiceEncoder, WavLMEncoder
from talker_t2av.system import load_motion, load_speaker, load_speech

FPS = 25
SLACK = 2  # frames by which sound and picture of a clip may differ; the longer is cut
MIN_STD = 1e-6


@dataclass(frozen=True)
class FeatureEncoders:
    """The frozen networks that make the features."""

    speech: Codec
    motion: PortraitCodec
    speaker: VoiceEncoder | WavLMEncoder

    @classmethod
    def load(cls, speech: str | Path, motion: str | Path, speaker: str | Path) -> FeatureEncoders:
        """From release folders, or from the released files.

        Raises:
            UserError: a folder or file is missing, damaged, or of another model.
        """
        return cls(load_speech(speech), load_motion(motion), load_speaker(speaker))

    def digests(self) -> dict[str, str]:
        """By tensor of the feature files, the digest of what makes it."""
        return {
            "speech": self.speech.digest(),
            "motion": self.motion.digest(),
            "speaker": self.speaker.digest(),
        }


@dataclass(frozen=True)
class Source:
    """One clip as it is read: wave (N,) at the speech codec's rate, frames (T, H, W, 3) uint8; N = T times its hop."""

    name: str
    wave: np.ndarray
    frames: np.ndarray


def feature_path(root: Path, split: str, name: str) -> Path:
    return root / "talker" / split / f"{name}.safetensors"


def made_with(path: Path) -> dict[str, str]:
    """By tensor of a feature file, the digest of the weights that made it; {} where there is no such file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (FileNotFoundError, SafetensorError):
        return {}


def stale_clips(root: Path, corpus: Path, split: str, digests: dict[str, str]) -> list[str]:
    """Names of the clips of a split that lack a feature, or have one that other weights made; the shortest first."""
    rows = sorted(read_manifest(corpus, split), key=lambda row: row.get("frames", 0))
    return [row["id"] for row in rows if made_with(feature_path(root, split, row["id"])) != digests]


def read_source(corpus: Path, split: str, name: str, codec: Codec) -> Source:
    """CORPUS/SPLIT/NAME.wav and .mp4 as one clip.

    Raises:
        UserError: a file is missing or damaged, or their lengths differ by more than 2 frames.
    """
    wave = read_audio(corpus / split / f"{name}.wav", codec.sample_rate)
    frames = read_video(corpus / split / f"{name}.mp4", FPS)
    length = min(len(frames), len(wave) // codec.hop)
    if not length or max(len(frames), len(wave) // codec.hop) - length > SLACK:
        raise UserError(
            f"{name}: {len(wave) / codec.sample_rate:.2f} s of sound and {len(frames) / FPS:.2f} s of picture; "
            "they must be of one length"
        )
    return Source(name, wave[: length * codec.hop], frames[:length])


@torch.inference_mode()
def encode(clips: Sequence[Source], encoders: FeatureEncoders, wanted: Sequence[str]) -> list[dict[str, Tensor]]:
    """The `wanted` ones of speech (T, Z), motion (T, M), speaker (256,) of clips of one length, in float16.

    Clips of one length go through the speech codec together: nothing is padded, so a clip's features do not depend on
    its batch.
    """
    features: list[dict[str, Tensor]] = [{} for _ in clips]
    waves = torch.from_numpy(np.stack([clip.wave for clip in clips]))  # (B, N)
    if "speech" in wanted:
        for own, latents in zip(features, encoders.speech.encode(waves[:, None])):
            own["speech"] = latents
    if "speaker" in wanted:
        for own, wave in zip(features, resample(waves, encoders.speech.sample_rate, RATE)):
            own["speaker"] = encoders.speaker.embed(wave)
    if "motion" in wanted:
        for own, clip in zip(features, clips):
            video = video_to_tensor(clip.frames, encoders.motion.size)
            own["motion"] = encoders.motion.encode(video)
    return [{name: x.cpu().half().contiguous() for name, x in own.items()} for own in features]


def make_features(
    root: Path, corpus: Path, split: str, names: Sequence[str], encoders: FeatureEncoders
) -> Iterator[tuple[str, str]]:
    """Write the feature files of some clips of a split, a clip at a time; gives (name, "" or why it was left out).

    What a file has of the same weights stays as it is.
    """
    digests = encoders.digests()
    clips: list[Source] = []
    for name in names:
        try:
            clips.append(read_source(corpus, split, name, encoders.speech))
        except UserError as error:
            feature_path(root, split, name).unlink(missing_ok=True)
            yield name, str(error)

    def job(clip: Source) -> tuple[int, list[str]]:
        made = made_with(feature_path(root, split, clip.name))
        return len(clip.frames), [tensor for tensor in digests if made.get(tensor) != digests[tensor]]

    for (_, wanted), group in groupby(sorted(clips, key=job), job):
        batch = list(group)
        for clip, features in zip(batch, encode(batch, encoders, wanted)):
            path = feature_path(root, split, clip.name)
            if len(wanted) < len(digests):
                with safe_open(path, "pt") as file:
                    features |= {tensor: file.get_tensor(tensor) for tensor in digests.keys() - features.keys()}
            with atomic_output(path) as staging:
                save_file(features, staging, metadata=digests)
            yield clip.name, ""


def copy_manifests(root: Path, corpus: Path, splits: Sequence[str], left_out: Collection[str]) -> None:
    """Write ROOT/SPLIT.jsonl as in the corpus, without the clips that were left out."""
    for split in splits:
        rows = [row for row in read_manifest(corpus, split) if row["id"] not in left_out]
        with atomic_output(root / f"{split}.jsonl") as staging:
            staging.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_stats(root: Path, corpus: Path, digests: dict[str, str], left_out: Sequence[tuple[str, str]] = ()) -> Path:
    """Write ROOT/talker/stats.json from the training split's motion; gives its path.

    Raises:
        UserError: the training split has no features.
    """
    codes = []
    for row in read_manifest(corpus, "train"):
        path = feature_path(root, "train", row["id"])
        if path.is_file():
            with safe_open(path, "pt") as file:
                codes.append(file.get_tensor("motion").double())
    if not codes:
        raise UserError(f"no features of the training split in {root / 'talker'}: prepare the split train too")
    motion = torch.cat(codes)
    stats = {
        "motion_mean": motion.mean(0).tolist(),
        "motion_std": motion.std(0).clamp_min(MIN_STD).tolist(),
        "digests": digests,
        "left_out": [list(pair) for pair in left_out],
    }
    path = root / "talker" / "stats.json"
    with atomic_output(path) as staging:
        staging.write_text(json.dumps(stats, indent=1) + "\n")
    return path
