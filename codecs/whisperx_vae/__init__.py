"""Speech as Gaussian latents: wave <-> (T, 32) latents at 25 frames a second (WhisperX-VAE)."""

from whisperx_vae.features import log_mel, pad_or_trim
from whisperx_vae.vae import WhisperXVAE, WhisperXVAEConfig

__all__ = ["WhisperXVAE", "WhisperXVAEConfig", "log_mel", "pad_or_trim"]
