"""How large a file may be: settings of the commands (`limits.*`), checked before anything of that size is allocated."""

from __future__ import annotations

from dataclasses import dataclass, fields

from engine.settings import Group, setting


@dataclass
class Limits(Group, prefix="limits."):
    """Limits of the files that a process reads; larger ones are rejected before they are decoded."""

    pixels: int = setting(2**24, 2**8, 2**31, "most pixels of a video frame (4K has 8,294,400)")
    picture_pixels: int = setting(2**26, 2**8, 2**31, "most pixels of an image")
    seconds: float = setting(3600.0, 0.1, 1e6, "greatest length of a video or audio file in seconds")
    gap: float = setting(60.0, 0.1, 1e6, "most seconds between two frames of a video; more are damaged time stamps")


LIMITS = Limits()  # of this process


def set_limits(limits: Limits) -> None:
    """Use other limits in this process."""
    for field in fields(limits):
        setattr(LIMITS, field.name, getattr(limits, field.name))
