"""The MaskGCT acoustic codec: speech as 12 levels of residual discrete tokens at 50 Hz."""

from rvq_codec.codec import RVQCodec, RVQCodecConfig

__all__ = ["RVQCodec", "RVQCodecConfig"]
