"""Stages that compute features with networks.

Axes: T video frames (25 per second), J half seconds, F face crops, S image side, E lip feature width, K token
levels, Ds / Dm speech / motion channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from corpora.preparation.clip import FPS, RATE, RATE16, Encoder, Stage, WorkItem
from engine.codec import load_codec
from engine.errors import UserError
from engine.faces.crops import centre_square, portrait_square
from engine.media.audio import resample
from engine.media.pictures import video_to_tensor
from engine.nn.ge2e import GE2EEncoder
from engine.settings import require_choice, require_range
from hicodit.conditions import encoder_config, make_encoders
from hicodit.conditions.poster2 import POSTER2
from hicodit.conditions.types import (
    EXPRESSIONS,
    NO_EXPRESSION,
    WINDOW_SECONDS,
    majority_expressions,
    num_expression_windows,
)
from hicodit.data import picture_frames
from hicodit.system import CODECS as TOKENIZERS
from hicodit.system import HiCoDiTSystem
from lia_x.data import pack_portraits
from talker_t2av.faces import Square
from talker_t2av.settings import CROPS
from talker_t2av.system import load_motion, load_speaker, load_speech

BLOCK = 64  # frames per batch of a motion codec: a minute of large float frames takes many GB


class Crops(Stage):
    """Stores mouth crops (T, S, S) and face crops (F, S', S', 3), in the sizes of HiCoDiT's condition encoders.

    Args:
        encoders: kind, and non-default sizes; see `hicodit.conditions.encoder_config`.
        pictures: F, number of face crops, evenly spaced over the clip.
    """

    needs = "face"
    tensors = ("mouth", "faces")

    def __init__(self, encoders: dict[str, Any] | None = None, pictures: int = 4) -> None:
        require_range("stages.crops.pictures", pictures, 1, 1000)
        self.encoders = encoder_config(encoders or {})
        self.pictures = pictures

    def __call__(self, clip: WorkItem) -> None:
        at = picture_frames(clip.length, self.pictures)
        clip.tensors["mouth"] = clip.crop_mouth(self.encoders)
        clip.tensors["faces"] = clip.crop_faces(self.encoders, at)


class Lip(Encoder):
    """Computes AV-HuBERT's lip features (T, E), so that training neither reads mouth crops nor runs the encoder.

    Args:
        encoders: fields of `hicodit.conditions.upstream.UpstreamEncoderConfig`.
    """

    needs = "face"
    tensors = ("lip",)
    encoder = "lip"

    def __init__(self, encoders: dict[str, Any], device: torch.device) -> None:
        super().__init__(device)
        self.encoders = make_encoders(encoder_config(encoders | {"kind": "upstream"}))
        self.network = self.encoders.network(self.encoder, device)

    def __call__(self, clip: WorkItem) -> None:
        mouth = clip.crop_mouth(self.encoders.config)[None].to(self.device)
        frames = torch.tensor([clip.length], device=self.device)
        clip.tensors["lip"] = _half(self.encoders.lip(mouth / 255, frames)[0])


class FaceIdentity(Lip):
    """Computes ArcFace's embeddings (F, 512) of single face crops, so that training reads no crops.

    Args:
        encoders: see `Lip`.
        pictures: F, number of face crops, evenly spaced over the clip.
    """

    tensors = ("face_identity",)
    encoder = "identity"

    def __init__(self, encoders: dict[str, Any], device: torch.device, pictures: int = 4) -> None:
        super().__init__(encoders, device)
        require_range("stages.face_identity.pictures", pictures, 1, 1000)
        self.pictures = pictures

    def __call__(self, clip: WorkItem) -> None:
        at = picture_frames(clip.length, self.pictures)
        faces = clip.crop_faces(self.encoders.config, at)
        faces = faces.permute(0, 3, 1, 2)[:, None]  # one image per row, for separate embeddings
        clip.tensors["face_identity"] = _half(self.encoders.identity(faces.to(self.device) / 255))


class Phonemes(Stage):
    """Stores the phoneme (T,) of each frame, if the source has labels.

    Args:
        symbols: phonemes, with indices from 1; 0 is silence.
    """

    tensors = ("phoneme",)

    def __init__(self, symbols: list[str] | None = None) -> None:
        self.symbols = symbols

    def __call__(self, clip: WorkItem) -> None:
        if clip.info.phonemes is not None and self.symbols:
            labels = phoneme_labels(clip.info.phonemes, clip.length, self.symbols)
            clip.tensors["phoneme"] = torch.from_numpy(labels)


class Expression(Encoder):
    """Computes the expression (J,) of each half second, an index into `EXPRESSIONS`: the label of the source, or else
    the expression of the face.

    Args:
        weights: a HiCoDiT release, whose classifier is used, or the released file of POSTER V2 (its licence is for
            research only), e.g. affectnet-7-model_best.pth.
        every: classify every n-th video frame.
    """

    needs = "face"
    tensors = ("expression",)

    def __init__(self, weights: str, device: torch.device, every: int = 5) -> None:
        super().__init__(device)
        require_range("stages.expression.every", every, 1, 1000)
        self.every = every
        is_poster = Path(weights).suffix in (".pth", ".pt")
        encoders = None if is_poster else HiCoDiTSystem.from_pretrained(weights).encoders
        if encoders is not None and not encoders.learns:
            raise UserError(f"stages.expression.weights={weights} has upstream encoders: set the file of POSTER V2")
        self.crops = encoder_config({"kind": "upstream"}) if is_poster else encoders.config
        network = POSTER2.from_pretrained(weights) if is_poster else encoders.expression
        self.network = network.to(device).eval()

    def __call__(self, clip: WorkItem) -> None:
        classes = expression_labels(clip.info.expression, num_expression_windows(clip.length))
        if classes is not None:
            clip.tensors["expression"] = classes.to(torch.uint8)
            return
        faces = clip.crop_faces(self.crops, range(0, clip.length, self.every)).permute(0, 3, 1, 2)
        logits = [self.network(part.to(self.device).float() / 255) for part in faces.split(16)]
        probabilities = torch.cat(logits).float().softmax(-1).cpu()
        classes = majority_expressions(probabilities.repeat_interleave(self.every, 0)[: clip.length])
        clip.tensors["expression"] = classes.to(torch.uint8)


class HeardExpression(Stage):
    """Computes the expression (J,) of the voice in each half second, HiCoDiT's condition in training.

    It is the label of the source, or else recognised from the surrounding audio; `NO_EXPRESSION` if unknown.

    Args:
        recogniser: see `corpora.preparation.engines.Emotion2Vec`; emotions other than `EXPRESSIONS` count as unknown.
            None: only labels of the source.
        seconds: length of the audio for the recogniser in seconds, centred on the half second.
    """

    tensors = ("heard_expression",)

    def __init__(self, recogniser: Any = None, seconds: float = 2.0) -> None:
        require_range("stages.heard_expression.seconds", seconds, 0.5, 30.0)
        self.recogniser = recogniser
        self.seconds = seconds

    def digests(self) -> dict[str, str]:
        return {"heard_expression": self.recogniser.name if self.recogniser else "labels"}

    def __call__(self, clip: WorkItem) -> None:
        windows = num_expression_windows(clip.length)
        classes = expression_labels(clip.info.expression, windows)
        if classes is None:
            classes = torch.full((windows,), NO_EXPRESSION)
            if self.recogniser is not None:
                middles = [(window + 0.5) * WINDOW_SECONDS for window in range(windows)]
                half = self.seconds / 2
                spans = [(max(0, round((m - half) * RATE16)), round((m + half) * RATE16)) for m in middles]
                heard = self.recogniser([clip.wave16[first:last] for first, last in spans])  # shorter at the ends
                for window, name in enumerate(heard):
                    classes[window] = EXPRESSIONS.index(name) if name in EXPRESSIONS else NO_EXPRESSION
        clip.tensors["heard_expression"] = classes.to(torch.uint8)


class GE2E(Encoder):
    """Computes the GE2E embedding (256,) of the voice, HiCoDiT's identity condition."""

    tensors = ("ge2e",)

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.encoder = GE2EEncoder(device)
        self.network = self.encoder.network

    def __call__(self, clip: WorkItem) -> None:
        clip.tensors["ge2e"] = torch.from_numpy(np.asarray(self.encoder.embed(clip.wave16, RATE16), np.float32))


class CodecEncoder(Encoder):
    """An encoder stage whose network is a codec, which is loaded by `load` and has `name` in the digests."""

    name: ClassVar[str]
    load: ClassVar[Callable[[str], Any]]

    def __init__(self, codec: str, device: torch.device) -> None:
        super().__init__(device)
        self.codec = type(self).load(codec).to(device).eval()

    def digests(self) -> dict[str, str]:
        return {self.name: self.codec.digest()}


class RVQTokens(CodecEncoder):
    """Computes RVQ tokens (2 T, K) of the audio."""

    tensors = ("tokens",)
    name = "rvq"
    load = partial(load_codec, codecs=TOKENIZERS)

    def __call__(self, clip: WorkItem) -> None:
        wave = resample(torch.from_numpy(clip.wave), RATE, self.codec.sample_rate)
        codes = self.codec.encode(wave[None, None].to(self.device))[0]  # (K, 2 T)
        if codes.shape[1] != 2 * clip.length:
            raise UserError(
                f"{codes.shape[1]} token frames for {clip.length} video frames: use a tokenizer of 50 frames per second"
            )
        clip.tensors["tokens"] = codes.T.to("cpu", torch.int16)


class SpeechLatents(CodecEncoder):
    """Computes WhisperX-VAE's latents (T, Ds) of the audio."""

    tensors = ("speech",)
    name = "whisperx_vae"
    load = load_speech

    def __call__(self, clip: WorkItem) -> None:
        clip.tensors["speech"] = _half(self.codec.encode(torch.from_numpy(clip.wave)[None, None])[0])


class Motion(CodecEncoder):
    """Computes LIA-X's motion codes (T, Dm) of the video, not normalised. Codes of the source are kept.

    Args:
        crop: "face" for the square around the face, as in generation; "centre" for the largest centred square.
    """

    needs = "face"
    tensors = ("motion",)
    name = "lia_x"
    load = load_motion

    def __init__(self, codec: str, device: torch.device, crop: str = "face") -> None:
        require_choice("stages.motion.crop", crop, CROPS)
        super().__init__(codec, device)
        self.crop = crop

    def __call__(self, clip: WorkItem) -> None:
        if "motion" in clip.tensors:  # codes of the source
            return
        frames = face_square(clip, self.crop).crop(clip.frames)
        blocks = (frames[start : start + BLOCK] for start in range(0, len(frames), BLOCK))
        motion = [self.codec.encode(video_to_tensor(block, self.codec.size)) for block in blocks]
        clip.tensors["motion"] = _half(torch.cat(motion))


class Portraits(Stage):
    """Stores square face images as JPEG (see `lia_x.data.pack_portraits`), for training LIA-X.

    Args:
        size: side in pixels.
        pictures: number of images, evenly spaced over the clip.
        crop: see `Motion`.
    """

    needs = "face"
    tensors = ("portraits", "portraits_at")

    def __init__(self, size: int = 512, pictures: int = 12, crop: str = "face") -> None:
        require_choice("stages.portraits.crop", crop, CROPS)
        require_range("stages.portraits.size", size, 16, 4096)
        require_range("stages.portraits.pictures", pictures, 2, 1000)
        self.size = size
        self.pictures = pictures
        self.crop = crop

    def digests(self) -> dict[str, str]:
        return {"portraits": f"{self.pictures} of {self.size} px"}

    def __call__(self, clip: WorkItem) -> None:
        if clip.length < 2:
            raise UserError("only one frame: a pair requires two")
        at = np.linspace(0, clip.length - 1, min(self.pictures, clip.length)).round().astype(int)
        frames = face_square(clip, self.crop).crop(clip.frames[at])
        clip.tensors["portraits"], clip.tensors["portraits_at"] = pack_portraits(frames, self.size)


def face_square(clip: WorkItem, crop: str) -> Square:
    """Return the square to crop from a clip: around the face, as in generation, or the largest centred one."""
    height, width = clip.frames.shape[1:3]
    if crop == "centre":
        return Square(*centre_square(height, width))
    assert clip.track is not None, "the stage face comes first"
    return Square(*portrait_square(np.median(clip.track.boxes[clip.track.seen], axis=0), height, width))


class Voice(CodecEncoder):
    """Computes the speaker embedding (256,) that conditions Talker-T2AV's heads.

    Args:
        encoder: release folder, or the file of the released encoder.
    """

    tensors = ("speaker",)
    name = "speaker"
    load = load_speaker

    def __init__(self, encoder: str, device: torch.device) -> None:
        super().__init__(encoder, device)

    def __call__(self, clip: WorkItem) -> None:
        wave = resample(torch.from_numpy(clip.wave), RATE, RATE16).to(self.device)  # as in generation
        clip.tensors["speaker"] = _half(self.codec.embed(wave))


def _half(x: Tensor) -> Tensor:
    x = x.cpu().half()
    if not x.isfinite().all():
        raise UserError("features contain NaN or infinite values")
    return x


def phoneme_labels(phonemes: list, frames: int, symbols: list[str]) -> np.ndarray:
    """Return the index (T,) of the phoneme at each frame's centre, counted from 1 in `symbols`; 0 for none."""
    labels = np.zeros(frames, np.uint8)
    for symbol, start, end in phonemes:
        if symbol in symbols:
            first = max(0, int(np.ceil(start * FPS - 0.5)))
            last = max(0, int(np.ceil(end * FPS - 0.5)))
            labels[first:last] = symbols.index(symbol) + 1
    return labels


def expression_labels(label: str | list[str] | None, windows: int) -> Tensor | None:
    """Return classes (J,) for a label of the whole clip, or for labels of each of `windows` half seconds. None without
    labels.
    """
    if label is None:
        return None
    labels = [label] * windows if isinstance(label, str) else label[:windows]
    unknown = [name for name in labels if name not in EXPRESSIONS]
    if unknown:
        raise UserError(f"expression {unknown[0]!r} is unknown: expected one of {', '.join(EXPRESSIONS)}")
    if len(labels) < windows:
        raise UserError(f"{len(labels)} expressions for {windows} half seconds: expected one for each")
    return torch.tensor([EXPRESSIONS.index(name) for name in labels])
