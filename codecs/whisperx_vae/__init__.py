"""Speech as Gaussian latents: wave <-> (T, 32) latents at 25 frames a second (WhisperX-VAE)."""

from engine.nn.mel import log_mel, pad_or_trim
from whisperx_vae.codec import WhisperXVAE, WhisperXVAEConfig

__all__ = ["WhisperXVAE", "WhisperXVAEConfig", "log_mel", "pad_or_trim"]
