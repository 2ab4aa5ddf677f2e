"""Portrait video as motion codes: picture + (T, 40) codes at 25 frames per second <-> frames (LIA-X)."""

from lia_x.codec import Identity, LiaX, LiaXConfig

__all__ = ["Identity", "LiaX", "LiaXConfig"]
