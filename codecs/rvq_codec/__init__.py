"""Speech as residual codes: wave <-> 12 levels of discrete tokens at 50 Hz (the MaskGCT acoustic codec)."""

from rvq_codec.codec import RVQCodec
from rvq_codec.config import RVQCodecConfig

__all__ = ["RVQCodec", "RVQCodecConfig"]
