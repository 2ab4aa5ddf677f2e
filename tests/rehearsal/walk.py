"""Run the commands of the documentation in one folder, scaled down by `table.yaml`.

Commands run in forks of one process that has imported everything, which saves ten seconds each. In a fork, worker
processes and the scripts that train.py calls are forks, too.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tests.rehearsal.commands import ROOT, Command, documented, is_python

TABLE = Path(__file__).with_name("table.yaml")
SECONDS = 1800  # that one command may take
LINKS = ("train.py", "infer.py", "scripts", "assets", "configs", "tests", "benchmarks")


@dataclass(frozen=True)
class Step:
    """A command as it is walked.

    words: of the program's call, [] for one that is excused. reason: why it is. missing: a package that it needs and
    that is not installed.
    """

    command: Command
    words: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    missing: str = ""

    @property
    def call(self) -> str:
        return shlex.join(self.words)


def plan(work: Path) -> list[Step]:
    """Return all documented commands, scaled down by the table; each needs a rule, and each rule a command."""
    table = OmegaConf.to_container(OmegaConf.load(TABLE))
    commands, used, steps = documented(), set(), []
    for command in commands:
        rules = [(i, rule) for i, rule in enumerate(table["rules"]) if re.search(rule["command"], command.text)]
        used |= {i for i, _ in rules}
        excuse = next((rule["excuse"] for _, rule in rules if "excuse" in rule), None)
        if excuse is None and not any({"size", "tiny"} & set(rule) for _, rule in rules):
            raise ValueError(f"{command.place}: {command.text!r} has neither a size nor an excuse in {TABLE.name}")
        if excuse is not None:
            steps.append(Step(command, reason=excuse))
            continue
        steps.append(_scaled(command, table["names"], [rule for _, rule in rules], work))
    idle = [rule["command"] for i, rule in enumerate(table["rules"]) if i not in used]
    if idle:
        raise ValueError(f"{TABLE.name}: no command in the documentation matches {idle}")
    return steps


def _scaled(command: Command, names: dict[str, str], rules: list[dict], work: Path) -> Step:
    text = command.text
    missing = next((r["needs"] for r in rules if "needs" in r and importlib.util.find_spec(r["needs"]) is None), "")
    for rule in rules:
        for pattern, new in rule.get("replace", {}).items():
            if not re.search(pattern, text):
                raise ValueError(f"{command.place}: {pattern!r} of {TABLE.name} does not occur in {text!r}")
            text = re.sub(pattern, new, text)
    for pattern, new in names.items():
        text = re.sub(pattern, new, text)
    if is_python(command):
        return Step(command, ("python", "-c", text), missing=missing)
    added = [word for kind in ("size", "tiny") for rule in rules for word in rule.get(kind) or []]
    text = f"{text} {' '.join(added)}".replace("{work}", str(work))
    shell = subprocess.run(["bash", "-fc", f"printf '%s\\0' {text}"], capture_output=True, text=True, check=True)
    words = shell.stdout.split("\0")[:-1]
    environment = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    words[0] = words[0].removeprefix(".venv/bin/")
    return Step(command, tuple(words), environment, missing=missing)


def set_up(work: Path) -> None:
    """The folder in which commands run: the checkout's programs, linked."""
    work.mkdir(parents=True, exist_ok=True)
    for name in LINKS:
        (work / name).symlink_to(ROOT / name)


def run_forked(action: Callable[[], None], log: Path) -> int:
    """Start an action in a copy of this process, which prints to `log`; returns its id."""
    sys.stdout.flush()
    log.parent.mkdir(exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("ab", buffering=0) as file, open(os.devnull) as nothing:
            for target, stream in ((0, nothing), (1, file), (2, file)):
                os.dup2(stream.fileno(), target)
        action()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pids: list[int]) -> int:
    """Return the first exit code that is not 0; when one process of a group fails, the others are killed."""
    running, code, end = set(pids), 0, time.monotonic() + SECONDS
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.discard(pid)
                code = code or os.waitstatus_to_exitcode(status)
        if code or time.monotonic() > end:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return code or 124
        time.sleep(0.01)
    return 0


class Runner:
    """Runs calls in the folder `work`, each with its own log."""

    def __init__(self, work: Path) -> None:
        self.work, self.groups = work, 0

    def run(self, words: Sequence[str], environment: dict[str, str], log: Path) -> int:
        """Run a call, which prints to `log`, and return its exit code."""
        if words[0] == "python" and words[1:3] != ("-m", "scripts.launch"):
            return wait([self._fork(words[1:], environment, log)])
        if words[0] == "torchrun":
            return wait(list(self._torchrun(words[1:], environment, log)))
        call = [sys.executable if words[0] == "python" else words[0], *words[1:]]
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as file:
            where = {"cwd": self.work, "env": os.environ | environment}
            return subprocess.run(
                call, stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=SECONDS, **where
            ).returncode

    def _torchrun(self, words: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[int]:
        """The processes of a group, as torchrun starts them."""
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        count = int(next(w.partition("=")[2] for w in words[:start] if w.startswith("--nproc_per_node=")))
        self.groups += 1
        about = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        about |= {"MASTER_PORT": 20_000 + (os.getpid() + 7 * self.groups) % 20_000}
        for rank in range(count):
            group = {name: str(value) for name, value in (about | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            yield self._fork(words[start:], environment | group, log)

    def _fork(self, words: Sequence[str], environment: dict[str, str], log: Path) -> int:
        def action() -> None:
            os.chdir(self.work)
            os.environ.update(environment)
            _fork_instead_of_spawning()
            _execute(list(words))

        return run_forked(action, log)


def _fork_instead_of_spawning() -> None:
    """Processes of the preparation and of benchmarks, and the scripts that programs call, become forks of this one."""
    for name in ("engine.processes", "benchmarks.common"):
        importlib.import_module(name).get_context = lambda _: multiprocessing.get_context("fork")
    real = subprocess.run

    def run(call: Any, *arguments: Any, **more: Any) -> subprocess.CompletedProcess:
        log = Path(getattr(more.get("stdout"), "name", "/dev/stdout"))  # of both streams
        known = not more or more == {"stdout": more.get("stdout"), "stderr": subprocess.STDOUT}
        if arguments or not known or call[0] != sys.executable or not str(call[1]).endswith(".py"):
            return real(call, *arguments, **more)
        words = [str(word) for word in call[1:]]
        return subprocess.CompletedProcess(call, wait([run_forked(lambda: _execute(words), log)]))

    subprocess.run = run


def _execute(words: list[str]) -> None:
    """What `python WORDS` does, in this process."""
    if words[0] == "-c":
        exec(compile(words[1], "documentation", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")
