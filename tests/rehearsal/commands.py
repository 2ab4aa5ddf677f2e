"""Takes the commands out of README.md and docs/*.md: those of code blocks, and those inside sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "LOG.md"))
# docs/LOG.md is a diary: its commands tell what was done, not what to do.
PROGRAMS = r"(?:python|torchrun|bash|sbatch|srun|ray|hf|pip|curl)"
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?{PROGRAMS} \S")


@dataclass(frozen=True)
class Command:
    """A command of the documentation. text: one line as it is printed, without its comment. line: where it begins."""

    page: str
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def documented() -> list[Command]:
    """All commands in the order of the pages; one that is printed several times counts once."""
    found: dict[str, Command] = {}
    for page in PAGES:
        for command in sorted(commands_of(page, (ROOT / page).read_text()), key=lambda command: command.line):
            found.setdefault(command.text, command)
    return list(found.values())


def commands_of(page: str, text: str) -> Iterator[Command]:
    """The commands of one Markdown text."""
    language, block, start = None, [], 0
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if fence := re.match(r"```(\w*)", line):
            if language is None:
                language, block, start = fence[1] or "text", [], number + 1
            else:
                yield from _block(page, start, block, language)
                language, block = None, []
        elif language is not None or line.startswith("    "):
            if not block:
                start = number
            block.append(line)
        elif block:
            yield from _block(page, start, block, "indented")
            block = []
    plain = re.sub(r"^(```.*?^```|(?: {4}[^\n]*\n)+)", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S)
    for match in re.finditer(r"`([^`]+)`", plain):
        words = " ".join(match[1].split())
        if COMMAND.match(words):
            yield from _commands(page, plain.count("\n", 0, match.start()) + 1, words)


def _block(page: str, start: int, lines: list[str], language: str) -> Iterator[Command]:
    if language == "python":
        yield Command(page, start, "\n".join(lines))
    elif language in ("bash", "indented"):
        joined, begin = "", start
        for number, line in enumerate(lines, start):
            if not joined:
                begin = number
            joined += " " + _uncommented(line).strip()
            if joined.endswith("\\"):
                joined = joined[:-1].rstrip()
                continue
            if COMMAND.match(joined.strip()):
                yield from _commands(page, begin, joined.strip())
            elif language == "bash" and joined.strip():
                raise ValueError(f"{page}:{begin}: {joined.strip()!r} is not understood as a command")
            joined = ""


def _commands(page: str, line: int, text: str) -> Iterator[Command]:
    """Commands that `&&` joins count one by one."""
    for part in text.split(" && "):
        yield Command(page, line, part.strip())


def _uncommented(line: str) -> str:
    """A shell line without its comment."""
    return re.sub(r"""(^|\s)#(?=(?:[^'"]|'[^']*'|"[^"]*")*$).*""", "", line)


def is_python(command: Command) -> bool:
    """Whether the command is a Python program rather than a line of the shell."""
    return not COMMAND.match(command.text)
