"""Limits of the service, without PyTorch, whose import takes seconds."""

from dataclasses import dataclass

from engine.settings import Group, setting

MAX_PICTURE = 2 * 2**20  # maximum bytes of an image of a stream


@dataclass(frozen=True)
class ServeLimits(Group, prefix="--"):
    """Limits of the service: options of `scripts/serve.py`."""

    rows: int = setting(8, 1, 1024, "requests in one batch")
    requests: int = setting(32, 1, 10_000, "requests in work or waiting; more are refused")
    streams: int = setting(8, 0, 10_000, "open streams; more are refused")
    megabytes: int = setting(32, 1, 1024, "largest body")
    videos: int = setting(64, 1, 10_000, "finished videos of /v1/videos that are kept, for an hour")
    seconds: float = setting(60.0, 0.2, 36_000.0, "longest clip, audio or stream")
    characters: int = setting(4096, 1, 4096, "longest text; it is spoken in parts, which are split at sentences")
    grace: float = setting(60.0, 0.0, 3600.0, "seconds in which accepted requests are finished after SIGTERM")
