"""LIA-X: portrait video as an identity image and motion codes (T, 40) at 25 frames per second."""

from lia_x.codec import Identity, LiaX, LiaXConfig

__all__ = ["Identity", "LiaX", "LiaXConfig"]
