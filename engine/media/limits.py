"""How large a file may be: settings of the commands (`limits.*`), checked before anything of that size is allocated."""

from __future__ import annotations

from dataclasses import dataclass, fields

from engine.bounds import bounded, check_bounds


@dataclass
class Limits:
    """
    pixels: of a video's frame; 4K has 9 million. picture_pixels: of a picture.
    seconds: of a video or sound. gap: between two frames of a video; larger ones are damaged time stamps.
    """

    pixels: int = bounded(2**8, 2**31, default=2**24)
    picture_pixels: int = bounded(2**8, 2**31, default=2**26)
    seconds: float = bounded(0.1, 1e6, default=3600.0)
    gap: float = bounded(0.1, 1e6, default=60.0)

    def __post_init__(self) -> None:
        check_bounds(self, "limits.")


LIMITS = Limits()  # of this process


def set_limits(limits: Limits) -> None:
    """Use other limits in this process."""
    for field in fields(limits):
        setattr(LIMITS, field.name, getattr(limits, field.name))
