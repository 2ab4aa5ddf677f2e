"""Training of the small voice encoder by distillation from GE2E embeddings (Wan et al. 2018, arXiv:1710.10467).

Axes: B batch, M mel bands, T frames, D embedding, V voices, N samples, n clips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from engine.errors import UserError
from engine.evaluation.validation import Share
from engine.media.audio import read_audio
from engine.release import load_strict
from engine.settings import require_range
from engine.shards.recordings import read_voices
from engine.shards.source import join
from engine.training.task import ReleaseInfo, Task
from talker_t2av.speaker.encoder import RATE, VoiceEncoder, VoiceEncoderConfig, level_mel

FRAMES_A_SECOND = 100


class VoiceClips:
    """Random log-mel crops of the clips of a split, with their GE2E embeddings and voices.

    Args:
        corpus: folder of the recordings.
        shards: folder of its prepared splits, with GE2E embeddings.
        split: name of the split.
        bands: number of bands of the log-mel spectrogram.
        seconds: length of a crop; a shorter clip is repeated.
    """

    def __init__(
        self, corpus: str | Path, shards: str | Path, split: str = "train", bands: int = 80, seconds: float = 1.0
    ) -> None:
        self.folder = Path(corpus) / split
        self.bands = bands
        require_range("data.train.seconds", seconds, 0.1, 60.0)
        self.frames = round(seconds * FRAMES_A_SECOND)
        self.names, speakers, embeddings = zip(*read_voices(join(shards, split)))
        self.voices = number_voices(speakers)
        self.ge2e = torch.stack(embeddings)
        self._mels: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.names)

    def mel(self, index: int) -> Tensor:
        """Return the log-mel spectrogram (M, T) of a clip. Spectrograms are cached in half precision."""
        if index not in self._mels:
            wave = torch.from_numpy(read_audio(self.folder / f"{self.names[index]}.wav", RATE))
            self._mels[index] = level_mel(wave, self.bands).half()
        return self._mels[index].float()

    def load(self, index: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return mel (M, T), ge2e (D,), voice (): a function of (index, generator)."""
        mel = self.mel(index)
        mel = mel.repeat(1, -(-self.frames // mel.shape[1]))
        start = int(torch.randint(mel.shape[1] - self.frames + 1, (), generator=generator))
        return {
            "mel": mel[:, start : start + self.frames],
            "ge2e": self.ge2e[index],
            "voice": self.voices[index],
        }

    collate = staticmethod(default_collate)  # mel (B, M, T), ge2e (B, D), voice (B,)


def number_voices(speakers: Sequence[str]) -> Tensor:
    """Return the index (n,) of the speaker of each clip in the sorted names of all speakers."""
    index = {name: number for number, name in enumerate(sorted(set(speakers)))}
    return torch.tensor([index[name] for name in speakers])


class VoiceEncoderTask(Task):
    """Distil GE2E into a `VoiceEncoder`.

    The loss is the squared distance between the embedding, divided by sqrt(D), and the clip's GE2E embedding, a unit
    vector. A cross entropy over the cosines with the mean GE2E embeddings of the training voices is added, so that
    similar voices are distinguished.

    Args:
        encoder: fields of `VoiceEncoderConfig`.
        corpus, shards: as in `VoiceClips`.
        held_out: splits for validation.
        voice_weight: weight of the cross entropy.
        temperature: the cosines are divided by it.
        noise: standard deviation of the noise on the log-mel in training.
        recipe: description of the recipe for the model card.
        init: initial release of the same sizes instead of random weights.
    """

    def __init__(
        self,
        encoder: Mapping[str, Any],
        corpus: str | Path,
        shards: str | Path,
        held_out: Sequence[str] = (),
        voice_weight: float = 0.1,
        temperature: float = 0.05,
        noise: float = 0.05,
        recipe: str = "",
        init: str | None = None,
    ):
        super().__init__()
        if temperature <= 0:
            raise UserError(f"task.temperature={temperature} must be positive")
        self.encoder = VoiceEncoder(VoiceEncoderConfig(**encoder))
        if init:
            load_strict(self.encoder, VoiceEncoder.from_pretrained(init).state_dict(), f"init={init}")
        self.corpus = corpus
        self.shards = shards
        self.held_out = tuple(held_out)
        self.recipe = recipe
        self.voice_weight = voice_weight
        self.temperature = temperature
        self.noise = noise
        _, speakers, embeddings = zip(*read_voices(join(shards, "train")))
        voices = number_voices(speakers)
        units = F.normalize(torch.stack(embeddings), dim=-1)
        means = torch.zeros(len(voices.unique()), units.shape[-1]).index_add(0, voices, units)
        self.register_buffer("means", F.normalize(means, dim=-1), persistent=False)  # (V, D)

    def parts(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder}

    def tokens(self, batch: dict[str, Tensor]) -> int:
        """Count the mel frames of a batch."""
        return batch["mel"].shape[0] * batch["mel"].shape[-1]

    def forward(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        """Return the losses of a batch of `VoiceClips`."""
        mel = batch["mel"]
        embedding = self.encoder(mel + self.noise * torch.randn_like(mel))
        distance = (embedding / embedding.shape[-1] ** 0.5 - batch["ge2e"]).square().sum(-1).mean()
        cosines = F.normalize(embedding, dim=-1) @ self.means.T
        voice = F.cross_entropy(cosines / self.temperature, batch["voice"])
        cosine = F.cosine_similarity(embedding, batch["ge2e"]).mean()
        loss = distance + self.voice_weight * voice
        return {"loss": loss, "distance": distance.detach(), "voice": voice.detach(), "cosine": cosine.detach()}

    @torch.no_grad()
    def measure(self, folder: Path, share: Share) -> dict[str, float]:
        """Compute the mean cosine with GE2E of whole clips of the held-out splits, in one process."""
        results = {}
        for split in self.held_out if share.first else ():
            clips = VoiceClips(self.corpus, self.shards, split, self.encoder.config.bands)
            mels = (clips.mel(i)[None].to(self.means.device) for i in range(len(clips)))
            outputs = torch.cat([self.encoder(mel).cpu() for mel in mels])
            results[f"{split}/cosine"] = F.cosine_similarity(outputs, clips.ge2e).mean().item()
        return results

    def release_info(self) -> ReleaseInfo:
        config = self.encoder.config
        millions = sum(p.numel() for p in self.encoder.parameters()) / 1e6
        about = f"""16-kHz wave -> {config.embedding} numbers that distinguish voices: ECAPA-TDNN on {config.bands}
log-mel bands, {millions:.2f} M weights. It was trained to predict the GE2E embeddings of Resemblyzer
for the voices of its data. The numbers are not of unit length (about {config.embedding**0.5:.0f}); loudness drops out.

`cosine`: with GE2E, whole clips."""
        return self.release_of(
            "encoder",
            title="Voice encoder",
            about=about,
            usage="from talker_t2av.speaker.encoder import VoiceEncoder\n\n"
            'embedding = VoiceEncoder.from_pretrained("FOLDER").embed(wave)  # (N,) at 16 kHz',
        )
