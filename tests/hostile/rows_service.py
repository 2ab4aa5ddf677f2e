"""Rows of the doors: names of voices, devices, faces, files of word times."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from engine.faces.track import read_face
from engine.settings import check_place
from hicodit.settings import InferConfig, find_clips
from service.voices import Voices
from tests.hostile.rows_files import BAD_NAMES


def voice(name: str, folder: Path) -> None:
    """Ask for a voice of an empty folder by name."""
    Voices(None, folder).find(name)


def in_the_way(name: str, folder: Path) -> None:
    """Ask for word times where a folder has the name of the file."""
    (folder / "a.mp4").write_bytes(b"x")
    (folder / "out" / name).mkdir(parents=True)
    face = "all" if "face" in name else "largest"
    find_clips(InferConfig(input=str(folder / "a.mp4"), output=str(folder / "out"), timestamps=True, face=face))


def bad_place(value: str, _: Path) -> None:
    check_place("processes", value)


def bad_face(value: str, _: Path) -> None:
    read_face(value)


CASES = [
    ("voice: a path", partial(voice, BAD_NAMES["up inside"]), "is unknown; there are: none"),
    *(
        (f"devices: {value[:9]}", partial(bad_place, value), "must be a number from 1 to 64, or all")
        for value in ("0", "9" * 5000, "²", "65", "1.5")
    ),
    ("devices beside Ray", lambda _: check_place("ray", "2"), "set ray.workers and ray.gpus instead"),
    *(
        (f"face: {value[:9]}", partial(bad_face, value), "is unknown: choose largest")
        for value in ("0", "9" * 5000, "nose")
    ),
    *(
        (f"a folder {name}", partial(in_the_way, name), f"cannot write .*{name}: it is a folder")
        for name in ("a.json", "a_face9.wav")
    ),
]
