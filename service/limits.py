"""Limits of the service, without PyTorch, whose import takes seconds."""

from dataclasses import dataclass

from engine.settings import Group, setting

MAX_PICTURE = 2 * 2**20  # maximum bytes of an image of a stream


@dataclass(frozen=True)
class ServeLimits(Group, prefix="--"):
    """Limits of the service: options of `scripts/serve.py`."""

    rows: int = setting(8, 1, 1024, "requests in one batch")
    requests: int = setting(32, 1, 10_000, "requests in progress or queued; more are refused")
    streams: int = setting(8, 0, 10_000, "open streams; more are refused")
    megabytes: int = setting(32, 1, 1024, "maximum size of a request body in MB")
    videos: int = setting(64, 1, 10_000, "finished videos of /v1/videos that are kept, for an hour")
    seconds: float = setting(60.0, 0.2, 36_000.0, "maximum duration of a clip, an audio file or a stream in seconds")
    characters: int = setting(4096, 1, 4096, "maximum length of a text, which is split into sentences for generation")
    grace: float = setting(60.0, 0.0, 3600.0, "seconds to finish accepted requests after SIGTERM")
