"""The web service under load, over loopback: requests a second, latencies, and what becomes of bad requests.

Starts `scripts/serve.py` with the bundled models. First, for each number of clients, requests for speech of half a
second; then a longer run of 16 clients in which a tenth of the requests are wrong, a twentieth are cut off by the
client, and a twentieth are clips for HiCoDiT. Every other request must get the answer that it deserves, and the
server's memory must not grow. Server and clients share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.optional import require

ROOT = Path(__file__).resolve().parents[1]
LEAST = {"clients": 1, "requests": 1, "mixed": 0}
JOB = {"mode": "tts", "text": "set red", "max_seconds": 0.48, "min_seconds": 0.48}
WRONG = (
    {"mode": "sing", "text": "a"},
    JOB | {"text": "x" * 5000},
    JOB | {"seed": -1},
    b"{",
    [JOB],
    JOB | {"voice": "?"},
)
CUT = 0.2  # seconds after which a client leaves
PATIENCE = 600.0  # seconds for an answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16], help="numbers of clients")
    parser.add_argument("--requests", type=int, default=48, help="requests for each number of clients")
    parser.add_argument("--mixed", type=int, default=1000, help="requests of the longer run")
    parser.add_argument("--rows", type=int, default=8, help="rows of the server's batches")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    require("httpx", "httpx", "serve")
    for result in asyncio.run(_measure(args)):
        yield result, ", ".join(f"{key} {value}" for key, value in result.items())


async def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    import httpx

    results = []
    async with _server(args) as address, httpx.AsyncClient(base_url=address, timeout=PATIENCE) as client:
        await asyncio.gather(*(client.post("/talker", json=JOB) for _ in range(4)))  # warm up
        for clients in args.clients:
            results.append({"clients": clients} | await _load(client, clients, ["speech"] * args.requests))
        if args.mixed:
            kinds = [
                ("wrong" if i % 10 == 3 else {7: "cut", 11: "clip"}.get(i % 20, "speech")) for i in range(args.mixed)
            ]
            results.append({"clients": 16, "mixed": True} | await _load(client, 16, kinds))
    return results


async def _load(client: Any, clients: int, kinds: list[str]) -> dict[str, Any]:
    """Send all requests, as many at a time as there are clients."""
    clip = (ROOT / "assets" / "demo" / "silent.mp4").read_bytes()
    waiting, seconds, answers = iter(enumerate(kinds)), [], Counter()
    memory, begin, every = [], time.monotonic(), max(1, len(kinds) // 10)

    async def one(number: int, kind: str) -> str:
        start = time.monotonic()
        if kind == "clip":
            answer = await client.post(f"/hicodit?seed={number}", content=clip)
        elif kind == "wrong":
            body = WRONG[number % len(WRONG)]
            given = {"content": body} if isinstance(body, bytes) else {"json": body}
            answer = await client.post("/talker", **given)
        elif kind == "cut":
            long = JOB | {"max_seconds": 8.0, "min_seconds": 8.0}
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(client.post("/talker", json=long), CUT)
            return "cut off"
        else:
            answer = await client.post("/talker", json=JOB | {"seed": number})
        seconds.append(time.monotonic() - start)
        good = answer.status_code == (400 if kind == "wrong" else 200)
        one_sentence = kind != "wrong" or list(answer.json()) == ["error"]
        return f"{kind}: as it should" if good and one_sentence else f"{kind}: {answer.status_code}"

    async def worker() -> None:
        for number, kind in waiting:
            try:
                answers[await one(number, kind)] += 1
            except Exception as error:
                answers[f"lost ({type(error).__name__})"] += 1
            if number % every == 0:
                memory.append(await _metric(client, "process_resident_memory_bytes"))

    await asyncio.gather(*(worker() for _ in range(clients)))
    took = time.monotonic() - begin
    for _ in range(100):  # rows of clients that left end at their next step
        if (inside := await _metric(client, "requests_inside")) == 0:
            break
        await asyncio.sleep(0.2)
    quantiles = {f"p{q}_s": round(float(np.percentile(seconds, q)), 3) for q in (50, 90, 99)}
    figures = {"requests": len(kinds), "requests_a_second": round(len(kinds) / took, 2)} | quantiles
    megabytes = [round(value / 2**20) for value in memory]
    return figures | {"answers": dict(answers), "left_inside": int(inside), "server_memory_mb": megabytes}


async def _metric(client: Any, name: str) -> float:
    text = (await client.get("/metrics")).text
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else float("nan")


@contextlib.asynccontextmanager
async def _server(args: argparse.Namespace) -> AsyncIterator[str]:
    """The service in a process of its own, on a free port of this machine."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "scripts/serve.py", "--port", str(port), "--rows", str(args.rows)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": f"{ROOT}:{ROOT / 'codecs'}"}
    process = subprocess.Popen([*command, "--device", args.device.type], cwd=ROOT, env=environment)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            for _ in range(600):
                if process.poll() is not None:
                    raise UserError(f"the server ended with exit code {process.returncode}")
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/health")).status_code == 200:
                        break
                await asyncio.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)
