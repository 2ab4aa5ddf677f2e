"""Server of the web service, which finishes accepted requests on SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from types import FrameType

import uvicorn

from service.app import make_app
from service.limits import MAX_PICTURE
from service.service import Service

POLL = 0.05  # seconds between two looks whether all requests are answered
FLUSH = 5  # seconds in which answers reach their clients


class Server(uvicorn.Server):
    """Server with graceful shutdown. Requests after a signal receive status 503; earlier requests are finished.

    Requests that are unfinished after `limits.grace` seconds receive 503, and streams are closed. A second Ctrl-C stops
    the server immediately.
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
        """Start the shutdown, as uvicorn does on a signal."""
        if not self.service.closing:
            count = sum(self.service.inside.values())
            print(f"{signal.Signals(sig).name}: finishing {count} requests and streams", flush=True)
            self.service.close()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the requests, then close the connections.

        The wait is bounded, as clients of streams may have stopped sending.
        """
        self.service.close()
        latest = time.monotonic() + self.service.limits.grace + FLUSH
        while any(self.service.inside.values()) and not self.force_exit and time.monotonic() < latest:
            await asyncio.sleep(POLL)
        await super().shutdown(sockets)
