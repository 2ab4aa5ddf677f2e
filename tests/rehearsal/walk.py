"""Run the commands of README.md and docs/ at small size: `python -m tests.rehearsal WORK [PATTERN]`.

Commands are taken from code blocks and sentences; commands.yaml has the small words of each. They run in the order of
the pages in the folder WORK, in forks of one process that has imported everything, which saves ten seconds a command.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from engine.errors import UserError
from engine.optional import require_librosa

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "LOG.md"))
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:python|torchrun|bash|sbatch|srun|ray|hf|pip|curl|docker) \S")
SECONDS = 1800  # that one command may take
LINKS = ("train.py", "infer.py", "scripts", "assets", "configs", "tests", "benchmarks")
IMPORTED = (  # by commands
    "corpora.preparation.job", "corpora.preparation.faces", "corpora.preparation.filters", "corpora.preparation.media",
    "corpora.preparation.networks", "corpora.preparation.sources_listed", "corpora.preparation.sources_studio",
    "corpora.preparation.sources_footage", "corpora.synthetic.corpus", "engine.training.trainer", "hicodit.inference",
    "hicodit.task", "talker_t2av.inference", "talker_t2av.task", "tests.rehearsal.stand_ins", "tests.rehearsal.trees",
    "transformers.models.whisper", "matplotlib.pyplot",
)  # fmt: skip


class Step(NamedTuple):
    """A documented command: where it stands, its text, and the small call, or "" and the reason for none."""

    place: str
    text: str
    call: str = ""
    reason: str = ""


def documented() -> dict[str, str]:
    """Return the commands of all pages in their order, with the page and line where each stands first."""
    commands: dict[str, str] = {}
    for page in PAGES:
        for line, text in sorted(commands_of((ROOT / page).read_text())):
            for part in text.split(" && "):
                commands.setdefault(part.strip(), f"{page}:{line}")
    return commands


def commands_of(text: str) -> Iterator[tuple[int, str]]:
    """Yield line numbers and commands of a Markdown text; commands that `&&` joins are one."""
    blocks = r"^```(\w*)\n(.*?)^```|((?:^ {4}[^\n]*\n)+)"
    for match in re.finditer(blocks, text, re.M | re.S):
        if match[1] in ("bash", None):
            first = text.count("\n", 0, match.start()) + (1 if match[1] is None else 2)
            lines = re.sub(r"\\\n", lambda _: "\\\0", match[2] or match[3])
            for line in lines.split("\n"):
                words = " ".join(re.sub(r"\s#.*", "", part).strip() for part in f" {line}".split("\\\0"))
                if COMMAND.match(words):
                    yield first, words
                elif match[1] and words:
                    raise ValueError(f"line {first}: {words!r} is not understood as a command")
                first += 1 + line.count("\0")
    plain = re.sub(blocks, lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S)
    for match in re.finditer(r"`([^`]+)`", plain):
        if COMMAND.match(words := " ".join(match[1].split())):
            yield plain.count("\n", 0, match.start()) + 1, words


def plan(work: Path) -> list[Step]:
    """Return all documented commands with their small calls; each has a row of commands.yaml, each row a command."""
    table = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("commands.yaml")))
    rows, used, steps = table["rows"], set(), []
    for text, place in documented().items():
        row = next((row for row in rows if row in text), None)
        if row is None:
            raise ValueError(f"{place}: {text!r} has no row in commands.yaml")
        used.add(row)
        words = rows[row] or ""
        needs = [name for name, pattern in table["needs"].items() if re.search(pattern, text)]
        missing = [name for name in needs if importlib.util.find_spec(name) is None]
        if words.startswith("not run"):
            steps.append(Step(place, text, reason=words))
        elif missing:
            steps.append(Step(place, text, reason=f"passed over, as it needs {missing[0]}"))
        else:
            small = re.sub(r"\$(\w+)", lambda match: table["words"][match[1]], f"{text} {words}")
            for pattern, new in table["names"].items():
                small = re.sub(pattern, new, small)
            steps.append(Step(place, text, small.replace("WORK", str(work))))
    if idle := rows.keys() - used:
        raise ValueError(f"commands.yaml: no documented command has {sorted(idle)}")
    return steps


def fork(action: Callable[[], None], log: Path) -> int:
    """Start an action in a copy of this process, which prints to `log`; return its id."""
    sys.stdout.flush()
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


def run(call: str, work: Path, log: Path, number: int) -> int:
    """Run a call in the folder `work` and return its exit code."""
    shell = subprocess.run(["bash", "-fc", f"printf '%s\\0' {call}"], capture_output=True, text=True, check=True)
    words = [word.removeprefix(".venv/bin/") for word in shell.stdout.split("\0")[:-1]]
    environment = dict(words.pop(0).split("=", 1) for word in words[:1] if re.match(r"[A-Z_]+=", word))
    if words[1:3] == ["-m", "scripts.launch"]:  # the launcher starts processes of its own
        with log.open("ab") as file:
            call = [sys.executable, *words[1:]]
            return subprocess.run(call, stdout=file, stderr=file, timeout=SECONDS, cwd=work).returncode
    groups = [{}]
    if words[0] == "torchrun":
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        count = int(next(word.partition("=")[2] for word in words[:start] if word.startswith("--nproc_per_node=")))
        group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        group["MASTER_PORT"] = 20_000 + (os.getpid() + 7 * number) % 20_000
        groups = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
        words = words[start - 1 :]

    def action(group: dict[str, int]) -> None:
        os.chdir(work)
        os.environ.update(environment | {name: str(value) for name, value in group.items()})
        fork_instead_of_spawning()
        execute(words[1:])

    return wait([fork(lambda group=group: action(group), log) for group in groups])


def fork_instead_of_spawning() -> None:
    """Make processes of the preparation, and the scripts that programs call, forks of this one."""
    importlib.import_module("engine.processes").get_context = lambda _: multiprocessing.get_context("fork")
    real = subprocess.run

    def run(call: Any, *arguments: Any, **more: Any) -> subprocess.CompletedProcess:
        log = Path(getattr(more.get("stdout"), "name", "/dev/stdout"))  # of both streams
        known = not more or more == {"stdout": more.get("stdout"), "stderr": subprocess.STDOUT}
        if arguments or not known or call[0] != sys.executable or not str(call[1]).endswith(".py"):
            return real(call, *arguments, **more)
        words = [str(word) for word in call[1:]]
        return subprocess.CompletedProcess(call, wait([fork(lambda: execute(words), log)]))

    subprocess.run = run


def execute(words: list[str]) -> None:
    """Do in this process what `python WORDS` does."""
    sys.argv = words[1:] if words[0] == "-m" else words
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def unfinished(call: str, work: Path) -> str:
    """Return what a preparation that ended with 0 has left undone, "" for nothing."""
    output = re.search(r"prepare_data\.py .*\boutput=(\S+)", call)
    if not output:
        return ""
    indices = list((work / output[1]).glob("*/index.json"))
    empty = [str(path) for path in indices if json.loads(path.read_text())["clips"] == 0]
    return f"no clips in {', '.join(empty)}" if empty else "" if indices else f"no index below {output[1]}"


def main() -> int:
    work, pattern = Path(sys.argv[1]).resolve(), "".join(sys.argv[2:3])
    steps = [step for step in plan(work) if re.search(pattern, step.text)]
    logs = work / "logs"
    logs.mkdir(parents=True)
    for name in LINKS:
        (work / name).symlink_to(ROOT / name)
    os.environ |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'codecs'}", "OMP_NUM_THREADS": "1"}
    os.environ |= {"WANDB_MODE": "offline", "MPLBACKEND": "agg"}
    for name in IMPORTED:
        importlib.import_module(name)
    with suppress(UserError):
        require_librosa()
    from tests.rehearsal import stand_ins, trees

    for make in (lambda: trees.write(work), lambda: stand_ins.write(work)):
        if wait([fork(make, logs / "made.log")]):
            print((logs / "made.log").read_text())
            return 1
    failed = 0
    for number, (place, text, call, reason) in enumerate(steps):
        if not call:
            print(f"{place}  {text}: {reason}")
            continue
        log, began = logs / f"{number:03d}.log", time.monotonic()
        code = run(call, work, log, number)
        problem = f"exit code {code}" if code else unfinished(call, work)
        failed += bool(problem)
        print(f"{time.monotonic() - began:5.1f} s  {place}  {text[:110]}")
        if problem:
            print(f"    FAILED ({problem}): {call}", *log.read_text().splitlines()[-12:], sep="\n    ")
    ran = sum(bool(step.call) for step in steps)
    print(f"{ran} commands, {failed} failed, {len(steps) - ran} not run")
    return int(bool(failed))
