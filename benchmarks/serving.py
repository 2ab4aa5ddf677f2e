"""Load test of the web service over loopback: requests per second, latencies, and handling of invalid requests.

Starts `scripts/serve.py` with the bundled models. First, for each number of clients, requests for speech of half a
second through /v1; then a longer run of 16 clients of which a tenth of the requests are wrong, a twentieth are cut off
by the client, a twentieth are videos by HiCoDiT, and a twentieth are sent in chunks. Every request must receive the
expected status, and the memory of the server must not grow. Server and clients share the machine.

With `--size base`, the server has a Talker-T2AV of the released size with random weights, and no HiCoDiT.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.inference import build_talker
from engine.arguments import within
from engine.errors import UserError, require
from engine.files import CHECKOUT
from engine.processes import script_environment
from engine.settings import PRECISIONS
from talker_t2av.model import TalkerT2AV
from talker_t2av.system import BUNDLED

T = TypeVar("T")
CLIP = CHECKOUT / "assets" / "demo" / "silent.mp4"
VOICE = CHECKOUT / "assets" / "demo" / "voice.wav"
SPEECH = {
    "model": "talker-t2av", "input": "set red", "response_format": "wav", "min_seconds": 0.48, "max_seconds": 0.48,
    "reference_audio": base64.b64encode(VOICE.read_bytes()).decode(),
}  # fmt: skip
WRONG: tuple[tuple[str, dict[str, Any], int], ...] = (  # path, request, status
    ("audio/speech", {"json": SPEECH | {"model": "whisper-1"}}, 404),
    ("audio/speech", {"json": SPEECH | {"reference_audio": "?"}}, 400),
    ("audio/speech", {"json": SPEECH | {"input": "x" * 5000}}, 400),
    ("audio/speech", {"json": SPEECH | {"speed": 0}}, 400),
    ("audio/speech", {"json": SPEECH | {"seed": -1}}, 400),
    ("audio/speech", {"json": [SPEECH]}, 400),
    ("audio/speech", {"content": b'{"model": "talker-t2av", "inp'}, 400),
    ("audio/speech", {"json": SPEECH | {"reference_audio": None, "voice": "../../etc/voice"}}, 400),
    ("videos", {"data": {"model": "hicodit"}}, 400),
    ("videos", {"data": {"model": "hicodit", "seconds": "4"}, "files": {"input_reference": b"no video"}}, 400),
    ("audio/transcriptions", {"json": {}}, 404),
)
CUT = 0.2  # seconds after which a client leaves
PATIENCE = 600.0  # seconds for an answer
READY_SECONDS = 300  # for loading and warm-up
ENDING = 5  # seconds in which a server that has stopped answering ends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", nargs="+", type=within(1), default=[1, 4, 16], help="numbers of clients")
    parser.add_argument("--requests", type=within(1), default=48, help="requests for each number of clients")
    parser.add_argument("--mixed", type=within(0), default=1000, help="requests of the longer run")
    parser.add_argument("--rows", type=within(1), default=8, help="number of rows per batch of the server")
    parser.add_argument(
        "--size", choices=("tiny", "base"), default="tiny", help="size of Talker-T2AV; base does not support --mixed"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--sampling", choices=("release", "fast"), default="release")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    require("httpx", "httpx", "serve")
    if args.size == "base" and args.mixed:
        raise UserError("--size base only serves Talker-T2AV, with random weights: set --mixed 0")
    with _server(args) as (address, process):
        for result in _measure(address, process.pid, args):
            yield result, ", ".join(f"{key} {value}" for key, value in result.items())
            if result["left_inside"] is None:  # it may be about to end
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(ENDING)
            if process.poll() is not None:
                raise UserError(f"the server ended with exit code {process.returncode}")


def _measure(address: str, process: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of each load when it has ended, so that those before a failure are recorded."""
    asyncio.run(_with_client(address, _warm_up))
    for clients in args.clients:
        figures = asyncio.run(_with_client(address, _load, process, clients, ["speech"] * args.requests))
        yield {"clients": clients} | figures
    if args.mixed:
        others = {7: "cut", 11: "clip", 1: "chunks"}
        kinds = ["wrong" if i % 10 == 3 else others.get(i % 20, "speech") for i in range(args.mixed)]
        yield {"clients": 16, "mixed": True} | asyncio.run(_with_client(address, _load, process, 16, kinds))


async def _with_client(address: str, work: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    import httpx

    async with httpx.AsyncClient(base_url=address, timeout=PATIENCE) as client:
        return await work(client, *arguments)


async def _warm_up(client: Any) -> None:
    await asyncio.gather(*(_send(client, number, "speech") for number in range(4)))


async def _send(client: Any, number: int, kind: str) -> tuple[Any, int]:
    """Send a request to /v1; return the last answer, and the status that it should have."""
    if kind == "wrong":
        path, request, status = WRONG[number % len(WRONG)]
        return await client.post(f"/v1/{path}", **request), status
    if kind == "clip":
        files = {"input_reference": ("clip.mp4", CLIP.read_bytes())}
        answer = await client.post("/v1/videos", data={"model": "hicodit", "seed": str(number)}, files=files)
        while answer.status_code == 200 and answer.json()["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.5)
            answer = await client.get(f"/v1/videos/{answer.json()['id']}")
        if answer.status_code == 200:
            answer = await client.get(f"/v1/videos/{answer.json()['id']}/content")
        return answer, 200
    body = SPEECH | {"seed": number}
    if kind == "cut":
        body |= {"min_seconds": 8.0, "max_seconds": 8.0}
    if kind == "chunks":
        body |= {"response_format": "pcm", "stream_format": "audio"}
    return await client.post("/v1/audio/speech", json=body), 200


async def _load(client: Any, process: int, clients: int, kinds: list[str]) -> dict[str, Any]:
    """Send all requests, as many at a time as there are clients, to the server with the id `process`."""
    import httpx

    waiting = iter(enumerate(kinds))
    seconds = []
    answers = Counter()
    memory = []
    begin = time.monotonic()
    every = max(1, len(kinds) // 10)

    async def one(number: int, kind: str) -> str:
        start = time.monotonic()
        if kind == "cut":
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_send(client, number, kind), CUT)
            return "cut off"
        answer, status = await _send(client, number, kind)
        seconds.append(time.monotonic() - start)
        is_error = status >= 400
        if answer.status_code != status or (is_error and list(answer.json()) != ["error"]):
            return f"{kind}: {answer.status_code}"
        return f"{kind}: as it should" if is_error or answer.content else f"{kind}: empty"

    async def worker() -> None:
        for number, kind in waiting:
            try:
                answers[await one(number, kind)] += 1
            except Exception as error:
                answers[f"lost ({type(error).__name__})"] += 1
            if number % every == 0:
                with contextlib.suppress(OSError):  # the process has died, as its answers show
                    memory.append(resident_megabytes(process))

    await asyncio.gather(*(worker() for _ in range(clients)))
    took = time.monotonic() - begin
    inside = None
    with contextlib.suppress(httpx.TransportError):  # the server has died, as its answers show
        for _ in range(100):  # rows of clients that left end at their next step
            if (inside := (await client.get("/health")).json().get("requests")) == 0:
                break
            await asyncio.sleep(0.2)
    quantiles = {f"p{q}_s": round(float(np.percentile(seconds, q)), 3) for q in (50, 90, 99) if seconds}
    figures = {"requests": len(kinds), "requests_a_second": round(len(kinds) / took, 2)} | quantiles
    return figures | {"answers": dict(answers), "left_inside": inside, "server_memory_mb": memory}


def resident_megabytes(process: int) -> int:
    """Return the resident memory of a process on Linux in MB. Raise `ProcessLookupError` if it has ended."""
    status = Path(f"/proc/{process}/status").read_text()
    resident = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    if resident is None:  # its exit code has not been read yet
        raise ProcessLookupError(f"process {process} has ended")
    return int(resident[1]) // 1024


def save_released_size(folder: Path) -> None:
    """Write a release with random weights of the released size, and the tokenizer and codecs of the bundled one."""
    model = build_talker("base")
    bundled = TalkerT2AV.from_pretrained(BUNDLED).release
    model.save_pretrained(
        folder, "Random weights.", {name: value for name, value in bundled.items() if name not in ("kind", "model")}
    )
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder)


@contextlib.contextmanager
def _server(args: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run the service on a free port of this machine; yield its address and its process."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "scripts/serve.py", "--port", str(port), "--rows", str(args.rows)]
    environment = script_environment(OMP_NUM_THREADS=str(args.threads))
    command += [f"--{name}={getattr(args, name)}" for name in ("precision", "sampling")]
    folder = tempfile.TemporaryDirectory(prefix="serving-")  # deleted with the object, whatever happens
    if args.size == "base":
        save_released_size(Path(folder.name))
        command += ["--models", "talker_t2av", "--talker", folder.name]
    process = subprocess.Popen([*command, "--device", args.device.type], cwd=CHECKOUT, env=environment)
    try:
        for _ in range(2 * READY_SECONDS):
            if process.poll() is not None:
                raise UserError(f"the server ended with exit code {process.returncode}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            time.sleep(0.5)
        else:
            raise UserError(f"the server is not ready after {READY_SECONDS} s")
        yield address, process
    finally:
        process.terminate()
        try:
            process.wait(90)  # it finishes requests for up to a minute
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        folder.cleanup()
