"""Speech as Gaussian latents: wave <-> (T, 32) latents at 25 frames per second (WhisperX-VAE)."""

from whisperx_vae.codec import WhisperXVAE, WhisperXVAEConfig

__all__ = ["WhisperXVAE", "WhisperXVAEConfig"]
