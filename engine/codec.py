"""What the models know of a codec: its rates, the form of its code, `encode` and `decode`.

Axes: B batch, N samples, L code frames, Q levels, Z channels, T pictures, S side of a picture.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.errors import UserError
from engine.hub import release_folder
from engine.release import Released, release_kind


class Codec(Released):
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
        """Code frames a second."""
        return self.sample_rate / self.hop

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

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode latents (B, l, Z), chunk after chunk, l >= 0 -> waves (B, 1, n) that concatenate to `decode` of all
        latents.

        The last wave comes when `chunks` ends; a chunk that completes no frame yields nothing. See `StreamDecoder`.
        """
        decoder = StreamDecoder(self)
        yield from (wave for chunk in chunks if (wave := decoder.push(chunk)) is not None)
        if (wave := decoder.finish()) is not None:
            yield wave


class StreamDecoder:
    """A decoder of latents that arrive in chunks.

    A frame is returned as soon as the `reach` later frames that it depends on are there, and it is decoded with as many
    earlier ones: waves join exactly, up to the rounding of convolutions of another length (1e-5 in float32).
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.latest: Tensor | None = None  # the last frames, of which the first `returned` were returned
        self.returned = 0

    @torch.no_grad()
    def push(self, chunk: Tensor) -> Tensor | None:
        """Append latents (B, l, Z); return the wave (B, 1, n) of the frames that are complete, or None."""
        self.latest = chunk if self.latest is None else torch.cat([self.latest, chunk], 1)
        before, after = self.codec.reach
        ready = self.latest.shape[1] - after
        if ready <= self.returned:
            return None
        wave = self.codec.decode(self.latest)[..., self.returned * self.codec.hop : ready * self.codec.hop]
        drop = max(0, ready - before)
        self.latest, self.returned = self.latest[:, drop:], ready - drop
        return wave

    @torch.no_grad()
    def finish(self) -> Tensor | None:
        """Decode the remaining frames."""
        if self.latest is None or self.latest.shape[1] <= self.returned:
            return None
        return self.codec.decode(self.latest)[..., self.returned * self.codec.hop :]


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
        """Encode pictures (T, 3, S, S) in [-1, 1], which may lie on the host -> motion (T, Z)."""
        raise NotImplementedError

    def decode(self, code: Tensor, identity: Any) -> Tensor:
        """Decode motion (T, Z) and what `identity` returned -> pictures (T, 3, S, S), not clamped."""
        raise NotImplementedError


C = TypeVar("C", bound=Codec)


def load_codec(folder: str | Path, codecs: Mapping[str, type[C]]) -> C:
    """Load the codec of a release folder, here or on the hub, or of official files, in eval mode.

    Args:
        codecs: the classes to choose from, by kind. A model that takes a further codec has it in its table.
    """
    folder = release_folder(folder)
    for codec in codecs.values() if not (folder / "config.yaml").is_file() else ():
        official = codec.from_official(folder)
        if official is not None:
            return official
    kind = release_kind(folder)
    if kind not in codecs:
        raise UserError(f"weights folder {folder} holds a model of kind {kind!r}, but {' or '.join(codecs)} is needed")
    return codecs[kind].from_pretrained(folder)
