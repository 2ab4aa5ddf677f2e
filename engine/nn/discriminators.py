"""Waveform discriminators: multi-period (HiFi-GAN, Kong et al., 2020) and multi-resolution magnitude spectrogram.

Axes: B batch, N samples, P period, F frequency bins, T frames. Both map a waveform (B, 1, N) to a list with one
entry per sub-discriminator, each a list of its activated feature maps followed by the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.nn.audio_losses import discriminator_loss, feature_matching_loss, generator_loss
from engine.nn.dac import WNConv2d


class PeriodDiscriminator(nn.Module):
    """Discriminates a waveform (B, 1, N) reshaped to (B, 1, N / P, P), with convolutions along the long axis only.

    The widths are channels * growth^j, limited to `max_channels`.
    """

    def __init__(self, period: int, channels: int = 16, growth: int = 4, max_channels: int = 512):
        super().__init__()
        self.period = period
        widths = [1] + [min(channels * growth**j, max_channels) for j in range(5)]
        self.convs = nn.ModuleList(
            nn.Sequential(
                WNConv2d(widths[j], widths[j + 1], (5, 1), stride=(3 if j < 4 else 1, 1), padding=(2, 0)),
                nn.LeakyReLU(0.1),
            )
            for j in range(5)
        )
        self.output_conv = WNConv2d(widths[-1], 1, (2, 1), padding=(1, 0))

    def forward(self, wave: Tensor) -> list[Tensor]:
        x = F.pad(wave, (0, -wave.shape[-1] % self.period), mode="reflect")
        x = x.unflatten(-1, (-1, self.period))
        maps = []
        for conv in self.convs:
            x = conv(x)
            maps.append(x)
        return [*maps, self.output_conv(x).flatten(1)]


class MultiPeriodDiscriminator(nn.Module):
    """One `PeriodDiscriminator` per period; `sizes` are its channels, growth and max_channels."""

    def __init__(self, periods: Sequence[int] = (2, 3, 5, 7, 11), **sizes: int):
        super().__init__()
        self.discriminators = nn.ModuleList(PeriodDiscriminator(period, **sizes) for period in periods)

    def forward(self, wave: Tensor) -> list[list[Tensor]]:
        return [discriminator(wave) for discriminator in self.discriminators]


class SpectrogramDiscriminator(nn.Module):
    """Discriminates the STFT magnitude (B, 1, F, T) at one resolution with 2-D convolutions.

    Args:
        n_fft, hop, window: parameters of the STFT, which is centred and reflect-padded with a periodic Hann window.
        channels, max_channels: width of the first feature map, which doubles with every layer up to the maximum.
        kernels: kernel size of the first convolution, and of the last two.
        strides: strides of the other convolutions, whose kernels are 2 * stride + 1.
    """

    def __init__(
        self,
        n_fft: int,
        hop: int,
        window: int,
        channels: int = 32,
        max_channels: int = 512,
        kernels: Sequence[int] = (5, 3),
        strides: Sequence[int] = (2, 2, 2),
    ):
        super().__init__()
        self.n_fft = n_fft
        self.hop = hop
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        first, last = kernels
        widths = [1, *(min(channels * 2**j, max_channels) for j in range(len(strides) + 2))]
        kernels = [first, *(2 * stride + 1 for stride in strides), last]
        strides = [2, *strides, 1]
        layers = [
            nn.Sequential(WNConv2d(narrow, wide, kernel, stride=stride, padding=kernel // 2), nn.LeakyReLU(0.2))
            for (narrow, wide), kernel, stride in zip(pairwise(widths), kernels, strides, strict=True)
        ]
        layers.append(WNConv2d(widths[-1], 1, last, padding=last // 2))
        self.model = nn.ModuleDict({f"layer_{i}": layer for i, layer in enumerate(layers)})

    def forward(self, wave: Tensor) -> list[Tensor]:
        with torch.autocast(wave.device.type, enabled=False):
            x = wave.squeeze(1).to(self.window.dtype)
            spectrum = torch.stft(x, self.n_fft, self.hop, self.window.numel(), self.window, return_complex=True)
            power = torch.view_as_real(spectrum).square().sum(-1)
            x = power.clamp(1e-7, 1e3).sqrt().unsqueeze(1)
        maps = []
        for layer in self.model.values():
            x = layer(x)
            maps.append(x)
        return maps


class MultiResolutionDiscriminator(nn.Module):
    """One `SpectrogramDiscriminator` per resolution; `sizes` are its channels, max_channels, kernels and strides.

    `win_lengths` defaults to `fft_sizes`, `hop_sizes` to half of each window.
    """

    def __init__(
        self,
        fft_sizes: Sequence[int] = (78, 126, 206, 334, 542, 876, 1418, 2296),
        hop_sizes: Sequence[int] | None = None,
        win_lengths: Sequence[int] | None = None,
        **sizes: Any,
    ):
        super().__init__()
        windows = win_lengths or fft_sizes
        hops = hop_sizes or [window // 2 for window in windows]
        resolutions = enumerate(zip(fft_sizes, hops, windows, strict=True))
        self.model = nn.ModuleDict(
            {f"disc_{i}": SpectrogramDiscriminator(*resolution, **sizes) for i, resolution in resolutions}
        )

    def forward(self, wave: Tensor) -> list[list[Tensor]]:
        return [discriminator(wave) for discriminator in self.model.values()]


class WaveDiscriminators(nn.Module):
    """Multi-period and multi-resolution discriminators combined: waveform (B, 1, N) -> feature maps and logits
    of each.
    """

    def __init__(self, period: Mapping[str, Any], spectrogram: Mapping[str, Any]):
        super().__init__()
        self.period = MultiPeriodDiscriminator(**period)
        self.spectrogram = MultiResolutionDiscriminator(**spectrogram)

    def forward(self, wave: Tensor) -> list[list[Tensor]]:
        return self.period(wave) + self.spectrogram(wave)

    def own_losses(self, real: Tensor, fake: Tensor, active: bool) -> dict[str, Tensor]:
        """Return the losses of the discriminators' update. If not `active`, return a zero that depends on every
        parameter.
        """
        self.requires_grad_(True)
        if not active:
            return {"loss": sum(p.sum() for p in self.parameters()) * 0.0}
        on_real, on_fake = discriminator_loss(self(real), self(fake.detach()))
        return {"loss": on_real + on_fake, "real": on_real.detach(), "fake": on_fake.detach()}

    def generator_losses(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Return the `adversarial` and `feature` losses of the generator's update, computed after the discriminators'
        update.
        """
        self.requires_grad_(False)  # gradients are only needed for the waveform
        with torch.no_grad():
            of_real = self(real)
        of_fake = self(fake)
        return {"adversarial": generator_loss(of_fake), "feature": feature_matching_loss(of_real, of_fake)}
