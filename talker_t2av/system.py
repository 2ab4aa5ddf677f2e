"""Networks for inference: model, tokenizer and motion statistics; codecs and speaker encoder are loaded on demand.

Two kinds of folders can be loaded: a release folder, and a folder with the upstream files as downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.codec import Codec, PortraitCodec, load_codec
from engine.device import to_device
from engine.errors import UserError
from engine.files import CHECKOUT
from engine.hub import release_folder
from engine.progress import stage
from engine.release import find_codec
from lia_x.codec import LiaX
from talker_t2av.generation import is_padding
from talker_t2av.model import FPS, RATE, TalkerT2AV
from talker_t2av.request import MODES, Sampling
from talker_t2av.settings import ASSETS
from talker_t2av.speaker.encoder import VoiceEncoder, WavLMEncoder
from talker_t2av.text import TalkerTokenizer
from talker_t2av.upstream import MOTION_MEAN, MOTION_STD, find_upstream
from whisperx_vae.codec import WhisperXVAE

BUNDLED = ASSETS / "talker_t2av_real"
CODECS: dict[str, dict[str, type[Codec]]] = {  # supported codecs of each stream, by kind
    "speech": {WhisperXVAE.kind: WhisperXVAE},
    "motion": {LiaX.kind: LiaX},
}


@dataclass(frozen=True)
class MotionStats:
    """Mean and standard deviation (Dm,) of the motion channels. The heads operate on normalised motion (F, Dm)."""

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value.ndim != 1 or not value.isfinite().all() or (name == "std" and (value < 0).any()):
                sign = ", none of them negative" if name == "std" else ""
                raise UserError(f"motion_{name}={str(value.tolist())[:80]} must be a list of finite numbers{sign}")
        if len(self.mean) != len(self.std):
            raise UserError(
                f"motion_mean has {len(self.mean)} numbers and motion_std {len(self.std)}: their lengths must be equal"
            )

    def normalise(self, motion: Tensor) -> Tensor:
        """Normalise motion codes (F, Dm) on the CPU."""
        return (motion - self.mean) / self.std.clamp_min(1e-6)

    def restore(self, motion: Tensor) -> Tensor:
        """Invert `normalise`, on any device."""
        std = to_device(self.std.clamp_min(1e-6), motion.device)
        mean = to_device(self.mean, motion.device)
        return motion * std + mean

    @classmethod
    def read(cls, path: str | Path | None) -> MotionStats:
        """Read `motion_mean` and `motion_std` from a JSON file or URL. None: those of the released model."""
        if path is None:
            return cls(torch.tensor(MOTION_MEAN), torch.tensor(MOTION_STD))
        from engine.shards.source import read_json

        try:
            stats = read_json(path)
            return cls(*(torch.tensor(stats[name], dtype=torch.float32) for name in ("motion_mean", "motion_std")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read as motion statistics ({error!r}): recompute them") from error


class TalkerSystem:
    """The networks, in eval mode on one device. Codecs and speaker encoder are loaded on first use.

    Args:
        folder: a release folder, a release on the hub, or a folder (with subfolders) of upstream files.
        codecs: folders or files of `speech`, `motion`, `speaker` that override those of the release, which are searched
            in the release, next to it, among the bundled ones, and at their path during training. Upstream files are
            identified by their tensor names.

    Attributes:
        part_names: names of codecs and speaker encoder in training; empty for upstream files.
        digests: digests of the weights that computed the training features. Missing ones are not checked.
        picture_dtype: dtype for rendering faces. None: that of the model.
    """

    def __init__(
        self,
        folder: str | Path = BUNDLED,
        codecs: Mapping[str, str | Path] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder = release_folder(folder)
        self.codecs = codecs or {}
        self.picture_dtype: torch.dtype | None = None
        if not self.folder.is_dir():
            raise UserError(f"weights folder not found: {self.folder}")
        model, words = load_model(self.folder)
        config = model.release
        if config:
            try:
                self.part_names = dict(config["codecs"])
                self.stats = MotionStats(*(torch.tensor(config["motion"][name]) for name in ("mean", "std")))
                self.sampling = Sampling(**config.get("sampling", {}))
            # PyTorch raises RuntimeError for values that are not numbers.
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                if isinstance(error, UserError):
                    raise
                stated = self.folder / "config.yaml"
                raise UserError(f"{stated} has no valid entry {error}: export the release again") from error
        else:
            self.part_names = {}
            self.stats = MotionStats.read(None)
            self.sampling = Sampling()
        self.digests = config.get("digests") or {}
        self.tokenizer = TalkerTokenizer.from_pretrained(words)
        self.model = model.to(device)
        rows = model.llm.config.vocab_size
        if self.tokenizer.vocab_size > rows:
            size = self.tokenizer.vocab_size
            raise UserError(f"the tokenizer has {size} tokens, but the model only {rows}: use the model's tokenizer")
        _check_channels("motion statistics", model.config.motion_dim, len(self.stats.mean))

    @property
    def device(self) -> torch.device:
        """Device of all networks."""
        return self.model.device

    @property
    def codec_folders(self) -> dict[str, str | Path]:
        """Folders of the codecs and the speaker encoder, by the names used in the release."""
        return {Path(name).name: self.find(part) for part, name in self.part_names.items()}

    def find(self, part: str) -> str | Path:
        """Return the folder or file of `speech`, `motion` or `speaker`."""
        if self.codecs.get(part):
            return self.codecs[part]
        if not self.part_names:
            return find_upstream(self.folder, part)
        if part not in self.part_names:
            raise UserError(f"{self.folder} was trained without a {part} codec: set codecs.{part}=FOLDER")
        kinds = CODECS.get(part, (VoiceEncoder.kind,))
        return find_codec(self.folder, self.part_names[part], kinds, ASSETS)

    @cached_property
    def speech(self) -> Codec:
        """The speech codec."""
        codec = self._load("speech")
        _check_channels("speech latents", self.model.config.speech_dim, codec.channels)
        if (codec.sample_rate, codec.frame_rate) != (RATE, FPS):
            raise UserError(
                f"the model needs speech at {RATE} Hz in {FPS} latents per second, not at {codec.sample_rate} Hz in "
                f"{codec.frame_rate:g}: use the codec of its release"
            )
        return codec

    @cached_property
    def silence(self) -> Tensor:
        """Latent (Ds,) of silence."""
        with torch.inference_mode(False):
            return self.speech.encode(torch.zeros(1, 1, RATE, device=self.device))[0, FPS // 2]

    def silence_padding(self, latents: Tensor) -> Tensor:
        """Replace padding in generated speech latents (..., F, Ds) with silence.

        In training, as in the official program, the last patch of a clip is filled with zeros, which are targets, too.
        The model therefore generates zeros after the speech, and the codec, which never had such latents, decodes
        them to noise.
        """
        padding = is_padding(latents)[..., None]  # a test whether there is any would synchronise
        return torch.where(padding, self.silence.to(latents.dtype), latents)

    @cached_property
    def motion(self) -> PortraitCodec:
        """The portrait codec. Faces are rendered in the model's precision."""
        codec = self._load("motion")
        _check_channels("motion codes", self.model.config.motion_dim, codec.channels)
        codec.dtype = self.picture_dtype or self.model.dtype
        return codec

    @cached_property
    def speaker(self) -> VoiceEncoder | WavLMEncoder:
        """The speaker encoder."""
        return self._load("speaker")

    @cached_property
    def voice_digest(self) -> str:
        """Digest of the speaker encoder, stored in saved voices. All its weights are read once."""
        return self.speaker.digest()

    def require(self, mode: str) -> None:
        """Load the networks that a mode needs.

        Raises:
            UserError: If one of them cannot be loaded.
        """
        uses = MODES[mode]
        needed = {"speech": True, "motion": uses.motion != "absent", "speaker": uses.speech == "generated"}
        for part in (part for part in needed if needed[part]):
            try:
                getattr(self, part)
            except UserError as error:
                raise UserError(f"mode={mode}: {error}") from error

    def _load(self, part: str) -> Any:
        path = self.find(part)
        # Weights created in inference mode could not be used outside of it.
        with stage("loading"), torch.inference_mode(False):
            network = LOADERS[part](path)
            expected = self.digests.get(part)
            if expected is not None and expected not in (network.digest(), _keeps(network)):
                raise UserError(
                    f"{path} computes other features than the model was trained on: use the codec of its release"
                )
            return network.to(self.device)


def _keeps(network: Any) -> str | None:
    """Return the digest of an earlier codec whose codes a codec also decodes, or None."""
    return getattr(network, "release", {}).get("keeps")


def load_model(folder: str | Path) -> tuple[TalkerT2AV, Path]:
    """Load the model from a release folder or upstream files. Return it and the folder of its tokenizer."""
    folder = release_folder(folder)
    if (folder / "config.yaml").is_file():
        return TalkerT2AV.from_pretrained(folder), folder
    weights = find_upstream(folder, "model")
    tokenizer = find_upstream(folder, "tokenizer")
    return TalkerT2AV.from_upstream(weights), tokenizer.parent


def load_speech(folder: str | Path) -> Codec:
    """Load a speech codec of `CODECS`."""
    return load_codec(folder, CODECS["speech"])


def load_motion(folder: str | Path) -> PortraitCodec:
    """Load a portrait codec of `CODECS` in channels-last memory format, which is nearly twice as fast on a CPU."""
    return load_codec(folder, CODECS["motion"]).to(memory_format=torch.channels_last)


def load_speaker(path: str | Path) -> VoiceEncoder | WavLMEncoder:
    """Load the speaker encoder from a release folder or the upstream file."""
    path = release_folder(path)
    return (VoiceEncoder if (path / "config.yaml").is_file() else WavLMEncoder).from_pretrained(path)


LOADERS = {"speech": load_speech, "motion": load_motion, "speaker": load_speaker}


def codec_digests(**codecs: str | Path) -> dict[str, str]:
    """Return the digest of the encoder weights of each stream (`speech`, `motion`, `speaker`).

    Args:
        codecs: release folder or upstream file by stream. Only given streams are loaded.
    """
    return {stream: LOADERS[stream](path).digest() for stream, path in codecs.items()}


def check_codecs(codecs: Mapping[str, str | Path | None]) -> None:
    """Load the codecs that exist on this machine, to detect wrong or damaged ones before training."""
    for stream, path in codecs.items():
        if path and any((place / path).exists() for place in (Path(), CHECKOUT)):
            LOADERS[stream](path)


def _check_channels(what: str, wanted: int, found: int) -> None:
    if wanted != found:
        raise UserError(f"the model needs {what} of {wanted} channels, not {found}: use the codec of its release")
