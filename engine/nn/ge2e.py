"""GE2E speaker embeddings (Wan et al. 2018, arXiv:1710.10467), by the package Resemblyzer, which includes the weights.

Axes: N samples.
"""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import torch

from engine.errors import UserError, require, require_librosa
from engine.media.audio import resample_wave

RATE = 16_000


class GE2EEncoder:
    """Computes GE2E embeddings of waveforms. The dot product of two embeddings is their cosine similarity.

    Args:
        device: device of the network.

    Attributes:
        network: Resemblyzer's encoder of mel spectrograms, an `nn.Module`.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated imports in webrtcvad and Resemblyzer
            resemblyzer = require("resemblyzer", "Resemblyzer")
            require_librosa()  # which Resemblyzer calls
        self.audio = resemblyzer.audio
        with contextlib.redirect_stdout(io.StringIO()):
            self.network = resemblyzer.VoiceEncoder(device, verbose=False)

    def embed(self, wave: np.ndarray, rate: int) -> np.ndarray:
        """Embed samples (N,) at `rate` Hz: (256,) float32, of unit length and non-negative.

        Resemblyzer's preprocessing raises the volume to -30 dBFS and trims silence.

        Raises:
            UserError: If no speech is found in the waveform.
        """
        wave = resample_wave(wave, rate, RATE)
        if not np.any(wave):
            raise UserError("no speaker embedding: the audio is silent")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            speech = self.audio.preprocess_wav(wave)
        if len(speech) == 0:
            raise UserError("no speaker embedding: no speech was found in the audio")
        return self.network.embed_utterance(speech)
