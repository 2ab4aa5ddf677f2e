"""The server of the web service: at SIGTERM or Ctrl-C it finishes what it has accepted."""

from __future__ import annotations

import asyncio
import signal
import socket
from types import FrameType

import uvicorn

from service.app import make_app
from service.limits import MAX_PICTURE
from service.service import Service

POLL = 0.05  # seconds between two looks whether all requests are answered
FLUSH = 5  # seconds in which answers reach their clients


class Server(uvicorn.Server):
    """Serves until a signal. Requests that come after it are answered 503; those before it are finished.

    What is not finished `limits.grace` seconds later is answered 503, too, and a stream is then cut off. A second
    Ctrl-C ends the server at once.
    """

    def __init__(self, service: Service, host: str, port: int) -> None:
        self.service = service
        super().__init__(
            uvicorn.Config(
                make_app(service),
                host=host,
                port=port,
                log_level="warning",
                ws="websockets-sansio",
                ws_max_size=MAX_PICTURE,
                timeout_graceful_shutdown=FLUSH,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end, as uvicorn does at a signal."""
        if not self.service.closing:
            count = sum(self.service.inside.values())
            print(f"{signal.Signals(sig).name}: finishing {count} requests and streams", flush=True)
            self.service.close()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the requests, then close the connections."""
        self.service.close()
        while any(self.service.inside.values()) and not self.force_exit:
            await asyncio.sleep(POLL)
        await super().shutdown(sockets)
