"""Run the commands of README.md and docs/ at small size: `python -m tests.rehearsal WORK [PATTERN]`.

Commands are taken from code blocks and sentences; commands.yaml has the small words of each. They run in the order of
the pages in the folder WORK, each in a new process.
"""

import importlib.util
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf

from tests import forked
from tests.rehearsal import stand_ins, trees

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "LOG.md"))
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:python|torchrun|bash|sbatch|srun|ray|hf|pip|curl|docker) \S")
PACKAGES = Path(__file__).with_name("packages")  # stand-ins of packages that are not installed
LINKS = ("train.py", "infer.py", "scripts", "assets", "configs", "tests", "benchmarks")


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
    excused = {part: f"not run: {reason}" for reason, parts in table["not_run"].items() for part in parts}
    rows = excused | table["rows"]
    used = set()
    steps = []
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


def words_of(call: str) -> list[str]:
    """Split a call into words as bash does."""
    shell = subprocess.run(["bash", "-fc", f"printf '%s\\0' {call}"], capture_output=True, text=True, check=True)
    return [word.removeprefix(".venv/bin/") for word in shell.stdout.split("\0")[:-1]]


def run(call: str, work: Path, log: Path) -> int:
    """Run a call in the folder `work`; return the first exit code that is not 0."""
    words = words_of(call)
    environment = dict(words.pop(0).split("=", 1) for word in words[:1] if re.match(r"[A-Z_]+=", word))
    environment |= {"WANDB_MODE": "offline", "MPLBACKEND": "agg"}
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(PACKAGES)])
    count = 1
    if words[0] == "torchrun":
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        count = int(next(word.partition("=")[2] for word in words[:start] if word.startswith("--nproc_per_node=")))
        environment["LOCAL_WORLD_SIZE"] = count
        words = words[start - 1 :]
    started = forked.start_group([log] * count, forked.program, work, words[1:], **environment)
    end = time.monotonic() + forked.SECONDS
    while time.monotonic() < end and any(process.is_alive() for process in started):
        wait([process.sentinel for process in started if process.is_alive()], 1.0)
        if any(process.exitcode for process in started):
            break
    for process in started:
        process.kill()
        process.join()
    return next((process.exitcode for process in started if process.exitcode), 0)


def unfinished(call: str, work: Path) -> str:
    """Return what a preparation that ended with 0 has left undone, "" for nothing."""
    output = re.search(r"prepare_data\.py .*\boutput=(\S+)", call)
    if not output:
        return ""
    indices = list((work / output[1]).glob("*/index.json"))
    empty = [str(path) for path in indices if json.loads(path.read_text())["clips"] == 0]
    return f"no clips in {', '.join(empty)}" if empty else "" if indices else f"no index below {output[1]}"


def walk(work: Path, pattern: str = "") -> tuple[int, list[str]]:
    """Run the commands that match; return how many failed, and why others were passed over."""
    steps = [step for step in plan(work) if re.search(pattern, step.text)]
    logs = work / "logs"
    logs.mkdir(parents=True)
    for name in LINKS:
        (work / name).symlink_to(ROOT / name)
    trees.write(work)
    stand_ins.write(work)
    failed = 0
    for number, (place, text, call, reason) in enumerate(steps):
        if not call:
            print(f"{place}  {text}: {reason}")
            continue
        log = logs / f"{number:03d}.log"
        began = time.monotonic()
        code = run(call, work, log)
        problem = f"exit code {code}" if code else unfinished(call, work)
        failed += bool(problem)
        print(f"{time.monotonic() - began:5.1f} s  {place}  {text[:110]}")
        if problem:
            print(f"    FAILED ({problem}): {call}", *log.read_text().splitlines()[-12:], sep="\n    ")
    ran = sum(bool(step.call) for step in steps)
    print(f"{ran} commands, {failed} failed, {len(steps) - ran} not run")
    return failed, [step.reason for step in steps if "passed over" in step.reason]
