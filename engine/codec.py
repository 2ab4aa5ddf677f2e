"""Codec interface: rates, code layout, `encode` and `decode`.

Axes: B batch, N samples, L code frames, Q levels, Z channels, T frames, S side of an image.
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
    """Base class of codecs, which encode a signal to a code and decode it.

    A token codec has `levels` and `codes`; its codes are (B, Q, L) int64. A latent codec has `channels`; its codes are
    (B, L, Z) floats.

    Attributes:
        sample_rate: samples, or frames, of the signal per second.
        hop: samples per code frame.
        levels, codes: Q, and the codebook size.
        channels: Z.
        reach: receptive field of the decoder, as code frames before and after a frame.
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
        """Return the number of code frames of a waveform with `samples` samples."""
        raise NotImplementedError

    def checked_frames(self, wave: Tensor) -> int:
        """Return the number of code frames of waveforms (B, 1, N).

        Raises:
            UserError: If type or shape are wrong, or the waveforms are too short for one frame or, on a CPU, not
                finite.
        """
        if not isinstance(wave, Tensor) or wave.dtype != torch.float32 or not len(wave):
            kind = getattr(wave, "dtype", type(wave).__name__)
            raise UserError(f"wave of type {kind}: expected a float32 tensor of shape (batch, 1, samples)")
        if wave.ndim != 3 or wave.shape[1] != 1:
            raise UserError(f"wave of shape {tuple(wave.shape)}: expected mono waveforms of shape (batch, 1, samples)")
        if (frames := self.frames(wave.shape[-1])) < 1:
            raise UserError(
                f"wave of {wave.shape[-1]} samples: expected at least {max(self.encoder.min_samples, self.hop)}"
            )
        if wave.device.type == "cpu" and not wave.isfinite().all():
            raise UserError("wave has samples that are not finite")
        return frames

    def encode(self, signal: Tensor) -> Tensor:
        """Encode waveforms (B, 1, N) in [-1, 1] at `sample_rate` to a code of N // hop frames, up to rounding at the
        end.
        """
        raise NotImplementedError

    def encode_beginning(self, signal: Tensor, frames: int) -> Tensor:
        """Encode the first `frames` frames of waveforms (B, 1, N). Only codecs with global context use the remaining
        samples.
        """
        return self.encode(signal[..., : frames * self.hop])

    def decode(self, code: Tensor) -> Tensor:
        """Decode the codes of L frames to waveforms (B, 1, hop * L)."""
        raise NotImplementedError

    def digest(self) -> str:
        """Return the first eight hex digits of the SHA-256 of the weights that `encode` uses."""
        raise NotImplementedError

    def decode_stream(self, chunks: Iterable[Tensor], axis: int = 1) -> Iterator[Tensor]:
        """Decode latents (B, l, Z), or codes (B, Q, l) with axis 2, chunk by chunk, where l >= 0. Yield waveforms (B,
        1, n) whose concatenation equals `decode` of all chunks.

        The last waveform is yielded after `chunks` ends. A chunk that completes no frame yields nothing. See
        `StreamDecoder`.
        """
        decoder = StreamDecoder(self, axis)
        yield from (wave for chunk in chunks if (wave := decoder.push(chunk)) is not None)
        if (wave := decoder.finish()) is not None:
            yield wave


FADE = 240  # samples of the cross-fade between two waveforms, the second of which was decoded with a longer look-ahead


class StreamDecoder:
    """Streaming decoder for a code that arrives in chunks.

    A frame is returned as soon as the later frames in its receptive field have arrived. It is decoded with the same
    number of earlier frames, so that the waveforms join exactly, up to rounding (1e-5 in float32).

    Args:
        axis: frame axis, 1 for latents and 2 for tokens.
        after: number of later frames to wait for. None uses the codec's `reach`; with fewer, consecutive waveforms are
            cross-faded.
    """

    def __init__(self, codec: Codec, axis: int = 1, after: int | None = None) -> None:
        self.codec = codec
        self.axis = axis
        self.before, reach = codec.reach
        self.after = reach if after is None else min(after, reach)
        self.fades = self.after < reach
        self.latest: Tensor | None = None  # buffered frames, of which the first `returned` have been returned
        self.returned = 0
        self.tail: Tensor | None = None  # continuation of the last waveform, for the cross-fade

    @torch.no_grad()
    def push(self, chunk: Tensor, last: bool = False) -> Tensor | None:
        """Append code frames. Return the waveform (B, 1, n) of the completed frames, or None."""
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
    """Base class of codecs that encode the frames of a face as motion and decode motion with an identity.

    Attributes:
        size: S. `engine.media.pictures` converts and resizes uint8 images.
        dtype: dtype of the decoder, float32 or bfloat16 (see `engine.precision`).
    """

    size: int
    dtype = torch.float32
    hop = 1

    def identity(self, picture: Tensor) -> Any:
        """Encode the identity of an image (3, S, S) in [-1, 1], which `decode` needs besides the motion."""
        raise NotImplementedError

    def encode(self, signal: Tensor) -> Tensor:
        """Encode frames (T, 3, S, S) in [-1, 1], on any device, to motion (T, Z)."""
        raise NotImplementedError

    def decode(self, code: Tensor, identity: Any) -> Tensor:
        """Decode motion (T, Z) and an `identity` to frames (T, 3, S, S), not clamped."""
        raise NotImplementedError


C = TypeVar("C", bound=Codec)
P = TypeVar("P", bound=Pretrained)


def load_codec(folder: str | Path, codecs: Mapping[str, type[C]]) -> C:
    """Load a codec in eval mode from a release folder, a release on the hub, or upstream files.

    `codecs` maps each supported kind to its class.
    """
    folder = release_folder(folder)
    if not (folder / "config.yaml").is_file():
        for codec in codecs.values():
            if (official := codec.read_official(folder)) is not None:
                return codec.from_tensors(*official, folder)
    kind = release_kind(folder)
    if kind not in codecs:
        raise UserError(
            f"weights folder {folder} contains a model of kind {kind!r}, but {' or '.join(codecs)} is needed"
        )
    return codecs[kind].from_pretrained(folder)


def load_like(model: type[P], folder: str, config: Any, free: Collection[str] = (), key: str = "task.codec") -> P:
    """Load the release that training starts from. Raise `UserError` if its config differs from `config` in a field not
    listed in `free`.

    `key` is the setting of `config`, for the error message.
    """
    network = model.from_pretrained(folder)
    for name, value in asdict(network.config).items():
        if name not in free and value != getattr(config, name):
            raise UserError(f"task.init={folder} has {name}={value}, but {key} requires {getattr(config, name)}")
    return network.train()
