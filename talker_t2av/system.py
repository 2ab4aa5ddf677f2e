"""All that inference needs, loaded as one: model, tokenizer, codecs, speaker encoder, motion statistics.

Two kinds of folder can be loaded: a release of ours, and a folder with the released files as they are downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.errors import UserError
from engine.hub import release_folder
from engine.release import companion
from lia_x.codec import KIND as LIA_X
from lia_x.codec import RELEASED_FILE as LIA_X_FILE
from talker_t2av.data import MotionStats
from talker_t2av.features import FeatureEncoders
from talker_t2av.model import TalkerT2AV
from talker_t2av.released_motion import MEAN, STD
from talker_t2av.request import Sampling
from talker_t2av.speaker.encoder import KIND as VOICE
from talker_t2av.speaker.released import FILE as SPEAKER_FILE
from talker_t2av.text import TalkerTokenizer
from whisperx_vae.codec import KIND as WHISPERX_VAE

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLED = ASSETS / "talker_t2av_tiny"
CODECS = {"speech": "whisperx_vae_tiny", "motion": "lia_x_tiny", "speaker": "voice_tiny"}  # of the bundled model
KINDS = {"speech": WHISPERX_VAE, "motion": LIA_X, "speaker": VOICE}
MODEL, TOKENIZER = "the Talker-T2AV model", "the tokenizer"
RELEASED_CODECS = {
    "speech": "the WhisperX-VAE checkpoint",
    "motion": "the LIA-X checkpoint",
    "speaker": "the WavLM speaker encoder",
}
RELEASED = {  # what: patterns of its file's name; the first that matches counts
    MODEL: ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    TOKENIZER: ("tokenizer.json", "vocab.json"),
    RELEASED_CODECS["speech"]: ("*.ckpt",),
    RELEASED_CODECS["motion"]: (LIA_X_FILE,),
    RELEASED_CODECS["speaker"]: (SPEAKER_FILE,),
}


@dataclass
class TalkerSystem:
    """The networks, all in eval mode on one device, and what belongs to them."""

    model: TalkerT2AV
    tokenizer: TalkerTokenizer
    encoders: FeatureEncoders
    stats: MotionStats
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        c, speech, motion = self.model.config, self.encoders.speech, self.encoders.motion.config
        rows = self.model.llm.config.vocab_size
        for what, wanted, found in (
            ("speech latents", c.speech_dim, speech.latent_dim),
            ("motion codes", c.motion_dim, motion.motion_dim),
            ("motion statistics", c.motion_dim, len(self.stats.mean)),
        ):
            if wanted != found:
                raise UserError(f"the model wants {what} of {wanted} channels, not {found}: name the codec of its own")
        if self.tokenizer.vocab_size > rows:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model only {rows}: name its own"
            )

    @property
    def device(self) -> torch.device:
        return self.model.task_embedding.weight.device

    def to(self, device: torch.device | str) -> TalkerSystem:
        """Move all networks; the motion statistics stay with motion files, on the CPU."""
        e = self.encoders
        for network in (self.model, e.speech, e.motion, e.speaker):
            network.to(device)
        return self

    @classmethod
    def load(cls, folder: str | Path = BUNDLED, codecs: Mapping[str, str | Path] | None = None) -> TalkerSystem:
        """A release folder of ours, here or on the hub, or a folder (with subfolders) that holds the released files.

        Args:
            codecs: folders of the codecs and the speaker encoder instead of those that the release names: any of
                `speech`, `motion`, `speaker`. Those are looked for in it, beside it, among the bundled ones, and
                where they were when it was trained.

        Raises:
            UserError: a file is missing (the message says which and how to get it), damaged, or does not fit.
        """
        folder = release_folder(folder)
        if not folder.is_dir():
            raise UserError(f"weights folder not found: {folder}")
        if (folder / "config.yaml").is_file():
            return cls._load_ours(folder, dict(codecs or {}))
        return cls._load_released(folder, dict(codecs or {}))

    @classmethod
    def _load_ours(cls, folder: Path, codecs: dict[str, str | Path]) -> TalkerSystem:
        model, config = TalkerT2AV.load(folder)
        for stream, bundled in CODECS.items():
            named = (config.get("codecs") or {}).get(stream, bundled)
            codecs.setdefault(stream, companion(folder, named, KINDS[stream], ASSETS))
        encoders = FeatureEncoders.load(**codecs)
        made = encoders.digests()
        for stream, digest in (config.get("digests") or {}).items():
            if made.get(stream) != digest:
                raise UserError(f"{codecs[stream]} makes other features than those {folder} learned: name its own")
        try:
            stats = MotionStats(*(torch.tensor(config["motion"][name]) for name in ("mean", "std")))
            sampling = Sampling(**config.get("sampling", {}))
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / 'config.yaml'} lacks or misspells {error}: make the release again") from error
        return cls(model, TalkerTokenizer.from_pretrained(folder), encoders, stats, sampling)

    @classmethod
    def _load_released(cls, folder: Path, codecs: dict[str, str | Path]) -> TalkerSystem:
        model, tokenizer = released_file(folder, MODEL), released_file(folder, TOKENIZER)
        for stream, what in RELEASED_CODECS.items():
            if stream not in codecs:
                codecs[stream] = released_file(folder, what)
        encoders = FeatureEncoders.load(**codecs)
        stats = MotionStats(torch.tensor(MEAN), torch.tensor(STD))
        words = TalkerTokenizer.from_pretrained(tokenizer.parent)
        return cls(TalkerT2AV.from_released(model.parent), words, encoders, stats)


def released_file(folder: Path, what: str) -> Path:
    """The file that holds `what` in `folder` or below it, the least deep one.

    Raises:
        UserError: there is none.
    """
    for pattern in RELEASED[what]:
        found = sorted(folder.rglob(pattern), key=lambda path: (len(path.parts), path))
        if found:
            return found[0]
    raise UserError(
        f"{folder} lacks {RELEASED[what][0]} ({what}): get it with  "
        f"python scripts/download_checkpoints.py talker_t2av --to {folder}"
    )
