"""How large a file may be: settings of the commands (`limits.*`), checked before anything of that size is allocated."""

from __future__ import annotations

from dataclasses import dataclass, fields

from engine.settings import check_settings, setting


@dataclass
class Limits:
    """
    pixels: of a video's frame; 4K has 9 million. picture_pixels: of a picture.
    seconds: of a video or sound. gap: between two frames of a video; larger ones are damaged time stamps.
    """

    pixels: int = setting(2**24, 2**8, 2**31)
    picture_pixels: int = setting(2**26, 2**8, 2**31)
    seconds: float = setting(3600.0, 0.1, 1e6)
    gap: float = setting(60.0, 0.1, 1e6)

    def __post_init__(self) -> None:
        check_settings(self, "limits.")


LIMITS = Limits()  # of this process


def set_limits(limits: Limits) -> None:
    """Use other limits in this process."""
    for field in fields(limits):
        setattr(LIMITS, field.name, getattr(limits, field.name))
