"""Calls of ffmpeg that make and inspect media files."""

import re
import subprocess
from pathlib import Path

from engine.media.ffmpeg import command


def ffmpeg(*arguments: object) -> None:
    subprocess.run(command("-v", "error", *map(str, arguments)), check=True)


def comment_of(path: Path) -> str | None:
    """Return the comment that ffmpeg reads in a file."""
    report = subprocess.run(command("-i", str(path)), capture_output=True, text=True).stderr
    found = re.search(r"^ +comment +: (.*)$", report, re.MULTILINE | re.IGNORECASE)
    return found and found[1]
