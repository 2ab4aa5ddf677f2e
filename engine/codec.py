"""What the models know of a codec: its rates, the form of its code, `encode` and `decode`.

Axes: B batch, N samples, L code frames, Q levels, Z channels, T frames, S side of a picture.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.errors import UserError
from engine.hub import release_folder
from engine.release import Pretrained, release_kind


class Codec(Pretrained):
    """A signal to a code and back.

    A codec of tokens has `levels` and `codes`; its codes are (B, Q, L) int64. A codec of latents has `channels`; its
    codes are (B, L, Z) floats.

    Attributes:
        sample_rate: samples, or pictures, of the signal a second.
        hop: samples of a code frame.
        levels, codes: Q, and how many values a token has.
        channels: Z.
        reach: how many code frames before and after a frame its part of the decoded signal depends on.
    """

    sample_rate: int
    hop: int
    levels: int
    codes: int
    channels: int
    reach: tuple[int, int] = (sys.maxsize, sys.maxsize)

    @property
    def frame_rate(self) -> float:
        """Code frames per second."""
        return self.sample_rate / self.hop

    def frames(self, samples: int) -> int:
        """Count the code frames of a wave of so many samples."""
        raise NotImplementedError

    def checked_frames(self, wave: Tensor) -> int:
        """Count the code frames of waves (B, 1, N); refuse other shapes, and waves that are too short for one."""
        if wave.ndim != 3 or wave.shape[1] != 1:
            raise UserError(f"wave of shape {tuple(wave.shape)}: give mono waves of shape (batch, 1, samples)")
        if (frames := self.frames(wave.shape[-1])) < 1:
            raise UserError(f"wave of {wave.shape[-1]} samples is too short: give {self.encoder.min_samples} or more")
        return frames

    def encode(self, signal: Tensor) -> Tensor:
        """Encode waves (B, 1, N) in [-1, 1] at `sample_rate` -> code of N // hop frames, up to rounding at the end."""
        raise NotImplementedError

    def encode_beginning(self, signal: Tensor, frames: int) -> Tensor:
        """Encode the first `frames` frames of waves (B, 1, N). Only a codec that looks at whole recordings uses the
        rest.
        """
        return self.encode(signal[..., : frames * self.hop])

    def decode(self, code: Tensor) -> Tensor:
        """Decode code of L frames -> waves (B, 1, hop * L)."""
        raise NotImplementedError

    def digest(self) -> str:
        """Return the first eight hex digits of the SHA-256 of the weights that `encode` uses."""
        raise NotImplementedError

    def decode_stream(self, chunks: Iterable[Tensor], axis: int = 1) -> Iterator[Tensor]:
        """Decode latents (B, l, Z), or codes (B, Q, l) with axis 2, chunk after chunk, l >= 0 -> waves (B, 1, n) that
        concatenate to `decode` of all chunks.

        The last wave comes when `chunks` ends; a chunk that completes no frame yields nothing. See `StreamDecoder`.
        """
        decoder = StreamDecoder(self, axis)
        yield from (wave for chunk in chunks if (wave := decoder.push(chunk)) is not None)
        if (wave := decoder.finish()) is not None:
            yield wave


FADE = 240  # samples over which a wave becomes the next one, where the latter was decoded with a longer look-ahead


class StreamDecoder:
    """A decoder of a code that arrives in chunks.

    A frame is returned as soon as the later frames that it depends on are there, and it is decoded with as many earlier
    ones: waves join exactly, up to the rounding of convolutions of another length (1e-5 in float32).

    Args:
        axis: of the frames: 1 of latents, 2 of tokens.
        after: later frames to wait for; None: the codec's `reach`. With fewer, each wave is faded into the next.
    """

    def __init__(self, codec: Codec, axis: int = 1, after: int | None = None) -> None:
        self.codec = codec
        self.axis = axis
        self.before, reach = codec.reach
        self.after = reach if after is None else min(after, reach)
        self.fades = self.after < reach
        self.latest: Tensor | None = None  # the last frames, of which the first `returned` were returned
        self.returned = 0
        self.tail: Tensor | None = None  # how the last wave continued

    @torch.no_grad()
    def push(self, chunk: Tensor, last: bool = False) -> Tensor | None:
        """Append code of some frames; return the wave (B, 1, n) of the frames that are complete, or None."""
        self.latest = chunk if self.latest is None else torch.cat([self.latest, chunk], self.axis)
        ready = self.latest.shape[self.axis] - (0 if last else self.after)
        hop = self.codec.hop
        if ready <= self.returned:
            return None
        decoded = self.codec.decode(self.latest)
        wave = decoded[..., self.returned * hop : ready * hop]
        tail = self.tail
        if self.fades and tail is not None:
            n = min(wave.shape[-1], tail.shape[-1])
            rise = torch.linspace(0, 1, n + 2, device=wave.device)[1:-1]
            wave = torch.cat([rise * wave[..., :n] + (1 - rise) * tail[..., :n], wave[..., n:]], -1)
        self.tail = decoded[..., ready * hop :][..., :FADE].clone()
        drop = max(0, ready - self.before)
        self.latest = self.latest.narrow(self.axis, drop, self.latest.shape[self.axis] - drop)
        self.returned = ready - drop
        return wave

    def finish(self) -> Tensor | None:
        """Decode the remaining frames."""
        return None if self.latest is None else self.push(self.latest.narrow(self.axis, 0, 0), last=True)


class PortraitCodec(Codec):
    """Pictures of one face to motion, and motion with an identity back to pictures.

    Attributes:
        size: S; `engine.media.pictures` converts and resizes bytes.
        dtype: of the decoder of pictures: float32, or bfloat16 (see `engine.precision`).
    """

    size: int
    dtype = torch.float32
    hop = 1

    def identity(self, picture: Tensor) -> Any:
        """Turn a picture (3, S, S) in [-1, 1] into what `decode` needs of the face besides its motion."""
        raise NotImplementedError

    def encode(self, signal: Tensor) -> Tensor:
        """Encode frames (T, 3, S, S) in [-1, 1], which may lie on the host -> motion (T, Z)."""
        raise NotImplementedError

    def decode(self, code: Tensor, identity: Any) -> Tensor:
        """Decode motion (T, Z) and what `identity` returned -> frames (T, 3, S, S), not clamped."""
        raise NotImplementedError


C = TypeVar("C", bound=Codec)
P = TypeVar("P", bound=Pretrained)


def load_codec(folder: str | Path, codecs: Mapping[str, type[C]]) -> C:
    """Load the codec of a release folder, here or on the hub, or of official files, in eval mode.

    `codecs` are the classes to choose from, by kind. A model that takes a further codec has it in its table.
    """
    folder = release_folder(folder)
    if not (folder / "config.yaml").is_file():
        for codec in codecs.values():
            if (official := codec.read_official(folder)) is not None:
                return codec.from_tensors(*official, folder)
    kind = release_kind(folder)
    if kind not in codecs:
        raise UserError(f"weights folder {folder} holds a model of kind {kind!r}, but {' or '.join(codecs)} is needed")
    return codecs[kind].from_pretrained(folder)


def load_like(model: type[P], folder: str, config: Any, free: Collection[str] = (), key: str = "task.codec") -> P:
    """Load the release that a training starts from; refuse one whose config differs from `config` but in `free`.

    `key` is the setting that `config` is from, for the message.
    """
    network = model.from_pretrained(folder)
    for name, value in asdict(network.config).items():
        if name not in free and value != getattr(config, name):
            raise UserError(f"task.init={folder} has {name}={value}, but {key} asks for {getattr(config, name)}")
    return network.train()
