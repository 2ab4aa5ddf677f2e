"""WhisperX-VAE: speech as Gaussian latents (T, 32) at 25 frames per second."""

from whisperx_vae.codec import WhisperXVAE, WhisperXVAEConfig

__all__ = ["WhisperXVAE", "WhisperXVAEConfig"]
