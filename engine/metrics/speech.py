"""Intelligibility, quality and prosody of speech.

Axes: N samples, F analysis frames.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.media.audio import resample
from engine.metrics.optional import need

RATE = 16_000


def stoi(reference: np.ndarray, degraded: np.ndarray, rate: int) -> float:
    """Short-time objective intelligibility (Taal et al. 2011), about 0 to 1; both (N,) at `rate` Hz, time-aligned.

    The longer wave is cut to the shorter one.
    """
    length = min(len(reference), len(degraded))
    return float(need("pystoi", "pystoi").stoi(reference[:length], degraded[:length], rate))


def pesq_wb(reference: np.ndarray, degraded: np.ndarray, rate: int) -> float:
    """Wide-band PESQ (ITU-T P.862.2), about 1.0 to 4.6; both (N,) at `rate` Hz.

    Raises:
        UserError: PESQ finds no speech in the reference, or the clip is too short (under a quarter of a second).
    """
    pesq = need("pesq", "pesq")
    pair = [resample(torch.as_tensor(np.asarray(x), dtype=torch.float32), rate, RATE) for x in (reference, degraded)]
    if not any(x.any() for x in pair):
        raise UserError("PESQ cannot be computed: both waves are silent")
    try:
        return float(pesq.pesq(RATE, pair[0].numpy(), pair[1].numpy(), "wb"))
    except pesq.PesqError as error:
        why = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else error
        raise UserError(f"PESQ cannot be computed: {why}") from error


def f0_and_energy(
    wave: np.ndarray | Tensor,
    rate: int,
    hop: float = 0.01,
    floor: float = 60.0,
    ceiling: float = 500.0,
    voicing: float = 0.45,
    octave_cost: float = 0.02,
) -> tuple[np.ndarray, np.ndarray]:
    """Fundamental frequency and energy of every analysis frame.

    The candidate of a frame is the highest peak of its autocorrelation divided by the autocorrelation of the window
    (Boersma 1993, "Accurate short-term analysis of the fundamental frequency"), with his octave cost; a median over
    five frames stands in for his path search.

    Args:
        wave: (N,) at `rate` Hz.
        hop: seconds between frames; frame i is centred at i * hop.
        floor, ceiling: the range searched, in Hz. The window is three periods of `floor` long.
        voicing: least correlation of a voiced frame.
        octave_cost: preference for the higher of two equal peaks, in units of correlation per octave.

    Returns:
        (F,) Hz, 0 where unvoiced; (F,) energy in dB of full scale, at least -100. F = floor(N / (hop rate)) + 1.
    """
    wave = torch.as_tensor(np.asarray(wave), dtype=torch.float32)
    step, width = round(hop * rate), 2 * round(1.5 * rate / floor)
    padded = torch.nn.functional.pad(wave, (width // 2, width // 2))
    frames = padded.unfold(0, width, step)
    window = torch.hann_window(width)
    energy = 10 * torch.log10((frames * window).square().sum(1) / window.square().sum() + 1e-10)

    centred = (frames - frames.mean(1, keepdim=True)) * window
    size = 1 << (2 * width - 1).bit_length()
    low, high = int(rate / ceiling), min(int(rate / floor) + 1, width - 2)

    def autocorrelation(x: Tensor) -> Tensor:
        r = torch.fft.irfft(torch.fft.rfft(x, size).abs().square(), size)[..., : high + 2]
        return r / r[..., :1].clamp_min(1e-12)

    correlation = autocorrelation(centred) / autocorrelation(window)
    lags = torch.arange(low, high + 1)
    here, before, after = correlation[:, lags], correlation[:, lags - 1], correlation[:, lags + 1]
    peak = (here > before) & (here >= after)
    score = torch.where(peak, here - octave_cost * torch.log2(lags * floor / rate), -torch.inf)
    best = score.argmax(1, keepdim=True)
    a, b, c = (x.gather(1, best).squeeze(1) for x in (before, here, after))
    shift = 0.5 * (a - c) / (a - 2 * b + c).clamp_max(-1e-9)  # vertex of the parabola through the three points
    f0 = rate / (lags[best.squeeze(1)] + shift)

    # Frames 50 dB under the loudest are background, however periodic.
    voiced = peak.any(1) & (b > voicing) & (energy > energy.max() - 50) & (energy > -90)
    f0 = torch.where(voiced, f0, 0.0)
    neighbours = torch.nn.functional.pad(f0, (2, 2)).unfold(0, 5, 1)
    f0 = torch.where(voiced, neighbours.median(1).values, 0.0)
    return f0.numpy(), energy.numpy()
