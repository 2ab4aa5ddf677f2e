"""Stages whose networks turn pictures and sound into what the models train on.

Axes: T video frames (25 a second), F face pictures, S picture side, K token levels, Ds / Dm speech / motion channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from corpora.preparation.clip import RATE, RATE16, Clip
from engine.codec import load_codec
from engine.errors import UserError
from engine.faces.square import centre_square, portrait_square
from engine.media.audio import resample
from engine.media.pictures import video_to_tensor
from engine.metrics.speaker import GE2EEncoder
from engine.release import weights_digest
from hicodit.conditions.poster2 import POSTER2
from hicodit.conditions.released import encoder_config
from hicodit.conditions.types import EXPRESSIONS
from hicodit.features import FACE_PICTURES, phoneme_labels
from hicodit.system import CODECS as TOKENIZERS
from talker_t2av.faces import CROPS, Square
from talker_t2av.system import load_motion, load_speaker, load_speech


class Crops:
    """Mouth pictures (T, S, S) and face pictures (F, S', S', 3), in the sizes of HiCoDiT's condition encoders.

    Args:
        encoders: kind, and sizes if they are not the usual ones; see `hicodit.conditions.released.encoder_config`.
        pictures: F, spread evenly over the clip.
    """

    needs = "frames"

    def __init__(self, encoders: dict[str, Any] | None = None, pictures: int = FACE_PICTURES) -> None:
        self.encoders, self.pictures = encoder_config(encoders or {}), pictures

    def __call__(self, clip: Clip) -> None:
        assert clip.track is not None, "the stage crops comes after the stage face"
        at = np.linspace(0, clip.length - 1, self.pictures + 2).round().astype(int)[1:-1]
        clip.tensors["mouth"] = torch.from_numpy(self.encoders.cut_mouth(clip.frames, clip.track))
        clip.tensors["faces"] = torch.from_numpy(self.encoders.cut_faces(clip.frames[at], clip.track[at]))


class Labels:
    """What the source tells by itself: the expression (), an index into `EXPRESSIONS`; each frame's phoneme (T,).

    Args:
        symbols: the phonemes that count, from 1 on; 0 is silence.
    """

    needs = ""

    def __init__(self, symbols: list[str] | None = None) -> None:
        self.symbols = symbols

    def __call__(self, clip: Clip) -> None:
        expression, phonemes = clip.info.expression, clip.info.phonemes
        if expression is not None:
            if expression not in EXPRESSIONS:
                raise UserError(f"expression {expression!r} is none of {', '.join(EXPRESSIONS)}")
            clip.tensors["expression"] = torch.tensor(EXPRESSIONS.index(expression), dtype=torch.uint8)
        if phonemes is not None and self.symbols:
            clip.tensors["phoneme"] = torch.from_numpy(phoneme_labels(phonemes, clip.length, self.symbols))


class Expression:
    """Mean probabilities (7,) of the expressions over the clip, by POSTER V2; a label of the source stands.

    Args:
        weights: the released file (its licence is for research only), e.g. affectnet-7-model_best.pth.
        every: video frames to a picture that is looked at.
    """

    needs = "frames"

    def __init__(self, weights: str, device: torch.device, every: int = 5) -> None:
        self.network, self.device, self.every = POSTER2.from_pretrained(weights).to(device).eval(), device, every
        self.cut = encoder_config({"kind": "released"}).cut_faces

    def __call__(self, clip: Clip) -> None:
        assert clip.track is not None, "the stage expression comes after the stage face"
        if "expression" not in clip.tensors:
            at = slice(0, clip.length, self.every)
            faces = torch.from_numpy(self.cut(clip.frames[at], clip.track[at])).permute(0, 3, 1, 2)
            parts = [self.network(part.to(self.device).float() / 255) for part in faces.split(16)]
            clip.tensors["expression"] = torch.cat(parts).softmax(-1).mean(0).float().cpu()


class GE2E:
    """The voice as the GE2E embedding (256,) that HiCoDiT's identity condition lives in."""

    needs = ""

    def __init__(self, device: torch.device) -> None:
        self.encoder = GE2EEncoder(device)

    def digests(self) -> dict[str, str]:
        return {"ge2e": weights_digest(self.encoder.network)}

    def __call__(self, clip: Clip) -> None:
        clip.tensors["ge2e"] = torch.from_numpy(np.asarray(self.encoder.embed(clip.wave16, RATE16), np.float32))


class RVQTokens:
    """Tokens (2 T, K) of the sound.

    Args:
        codec: release folder of the tokenizer.
    """

    needs = ""

    def __init__(self, codec: str, device: torch.device) -> None:
        self.codec = load_codec(codec, TOKENIZERS).to(device).eval()
        self.device = device

    def digests(self) -> dict[str, str]:
        return {"rvq": self.codec.digest()}

    def __call__(self, clip: Clip) -> None:
        wave = resample(torch.from_numpy(clip.wave), RATE, self.codec.sample_rate)
        codes = self.codec.encode(wave[None, None].to(self.device))[0]  # (K, 2 T)
        if codes.shape[1] != 2 * clip.length:
            raise UserError(f"{codes.shape[1]} token frames for {clip.length} pictures: the tokenizer is not of 50 Hz")
        clip.tensors["tokens"] = codes.T.to("cpu", torch.int16)


class SpeechLatents:
    """Latents (T, Ds) of the sound.

    Args:
        codec: release folder of the WhisperX-VAE.
    """

    needs = ""

    def __init__(self, codec: str, device: torch.device) -> None:
        self.codec = load_speech(codec).to(device).eval()

    def digests(self) -> dict[str, str]:
        return {"whisperx_vae": self.codec.digest()}

    def __call__(self, clip: Clip) -> None:
        clip.tensors["speech"] = _half(self.codec.encode(torch.from_numpy(clip.wave)[None, None])[0])


class Motion:
    """Motion codes (T, Dm) of the pictures, not normalised; those that the source gives are taken as they are.

    Args:
        codec: release folder of LIA-X.
        crop: "face" for the square round the face, as generation cuts it; "centre" for the largest in the middle.
    """

    needs = "frames"

    def __init__(self, codec: str, device: torch.device, crop: str = "face") -> None:
        if crop not in CROPS:
            raise UserError(f"stages.motion.crop={crop} is unknown: choose {' or '.join(CROPS)}")
        self.codec, self.crop = load_motion(codec).to(device).eval(), crop

    def digests(self) -> dict[str, str]:
        return {"lia_x": self.codec.digest()}

    def __call__(self, clip: Clip) -> None:
        if "motion" not in clip.tensors:
            video = video_to_tensor(self._square(clip).cut(clip.frames), self.codec.size)
            motion = self.codec.encode(video)
            clip.tensors["motion"] = _half(motion)

    def _square(self, clip: Clip) -> Square:
        height, width = clip.frames.shape[1:3]
        if self.crop == "centre":
            return Square(*centre_square(height, width))
        assert clip.track is not None, "the stage motion comes after the stage face"
        return Square(*portrait_square(np.median(clip.track.boxes[clip.track.seen], axis=0), height, width))


class Voice:
    """The voice (256,) that Talker-T2AV's heads are conditioned on.

    Args:
        encoder: release folder, or the file of the released encoder.
    """

    needs = ""

    def __init__(self, encoder: str, device: torch.device) -> None:
        self.encoder, self.device = load_speaker(encoder).to(device).eval(), device

    def digests(self) -> dict[str, str]:
        return {"speaker": self.encoder.digest()}

    def __call__(self, clip: Clip) -> None:
        clip.tensors["speaker"] = _half(self.encoder.embed(torch.from_numpy(clip.wave16).to(self.device)))


def _half(x: Tensor) -> Tensor:
    x = x.cpu().half()
    if not x.isfinite().all():
        raise UserError("a feature has values that are no numbers")
    return x
