"""New processes for tests, forked from a server that has imported what they need: each starts in no time."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from hydra.core.global_hydra import GlobalHydra

from engine import processes

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 1800  # that one program may take
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preloaded"])


def free_port() -> int:
    """Return a port of this machine on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(log: Path, environment: Mapping[str, Any], call: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Start `call(*arguments)` in a process of one thread that prints to `log`."""
    return _start((log, log), environment, call, arguments)


def start_group(
    logs: Sequence[Path], call: Callable[..., Any], *arguments: Any, **environment: Any
) -> list[BaseProcess]:
    """Start a call in processes that find each other, as torchrun would: one for each of the files `logs`."""
    if len(logs) == 1:
        return [start(logs[0], environment, call, *arguments)]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": len(logs)} | environment
    return [start(log, group | {"RANK": rank, "LOCAL_RANK": rank}, call, *arguments) for rank, log in enumerate(logs)]


def run_group(folder: Path, count: int, call: Callable[..., Any], *arguments: Any, code: int = 0) -> list[str]:
    """Run a call in `count` processes that find each other; assert their exit code and return what each printed."""
    logs = [folder / f"process-{rank}.txt" for rank in range(count)]
    started = start_group(logs, call, *arguments)
    for process in started:
        process.join(SECONDS)
    printed = [log.read_text() for log in logs]
    assert [process.exitcode for process in started] == [code] * count, "\n".join(printed)
    return printed


def run(*words: Any, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Do what `python WORDS` does in a folder, in a separate process, and return its exit code and what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder) / "out", Path(folder) / "err"
        process = _start(logs, {}, program, (cwd, list(map(str, words))))
        process.join(SECONDS)
        out, err = (log.read_text() for log in logs)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(words, SECONDS, out, err)
        return subprocess.CompletedProcess(words, process.exitcode, out, err)


def program(folder: Path, words: list[str]) -> None:
    """Do in this process what `python WORDS` does in a folder; processes that it starts are forks of this one."""
    os.chdir(folder)
    processes.get_context = lambda _: multiprocessing.get_context("fork")
    real = subprocess.run

    def fork(call: Any, *arguments: Any, **more: Any) -> subprocess.CompletedProcess:
        if call[0] != sys.executable or not str(call[1]).endswith(".py") or more.keys() - {"stdout", "stderr"}:
            return real(call, *arguments, **more)
        process = multiprocessing.get_context("fork").Process(target=_script, args=(call[1:], more.get("stdout")))
        process.start()
        process.join()
        return subprocess.CompletedProcess(call, process.exitcode)

    subprocess.run = fork
    _script(words)


def _script(words: list[Any], log: Any = None) -> None:
    if log is not None:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    GlobalHydra.instance().clear()  # a fork of a program begins without that program's Hydra
    sys.argv = [str(word) for word in words]
    if words[0] == "-m":
        sys.argv.pop(0)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        path = ROOT / words[0]
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")


def _start(logs: tuple[Path, Path], environment: Mapping[str, Any], call: Callable[..., Any], arguments: tuple) -> Any:
    whole = os.environ | {name: str(value) for name, value in environment.items()}
    process = SERVER.Process(target=_call, args=(logs, dict(whole), call, arguments))
    process.start()
    return process


def _call(logs: tuple[Path, Path], environment: dict[str, str], call: Callable[..., Any], arguments: tuple) -> None:
    for number, log in zip((1, 2), logs):
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    sys.path += [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    torch.set_num_threads(1)
    try:
        call(*arguments)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
