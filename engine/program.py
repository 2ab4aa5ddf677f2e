"""Runs a `@hydra.main` program: one-line error messages, `--help` with descriptions, and numbered sweeps.

@hydra.main(config_path=str(CONFIGS), config_name="train", version_base="1.3")
@runs(output="run")
def train(config: DictConfig) -> int:
    ...

def main() -> int:
    return run_program(train, "train", HELP, sys.argv[1:])
"""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from engine.config import CONFIGS, check, explained, find_field, options, prepared, register, walk
from engine.errors import UserError


class Failed(Exception):
    """A run of a sweep returned a non-zero exit code. The remaining runs continue."""


class Ended(BaseException):
    """A run ended early. This is a BaseException, as Hydra logs other exceptions."""


def runs(output: str) -> Callable[[Callable[[DictConfig], int | None]], Callable[[DictConfig], None]]:
    """Decorate the function passed to `@hydra.main`: check the configuration, choose the output folder, return the exit
    code.

    Args:
        output: name of the output folder setting. It is replaced by Hydra's output folder in sweeps (`-m`), where each
            run has a numbered folder, and with `hydra.run.dir=`.
    """

    def decorate(function: Callable[[DictConfig], int | None]) -> Callable[[DictConfig], None]:
        @functools.wraps(function)
        def run(config: DictConfig) -> None:
            is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
            try:
                check(config)
                _use_output_dir(config, output)
                code = function(config) or 0
            except UserError as error:
                if is_sweep:
                    raise
                raise Ended from error
            if code and is_sweep:
                raise Failed(code)
            if code:
                raise Ended(code)

        return run

    return decorate


def run_program(
    program: Callable[[], None],
    config_name: str,
    help_text: str,
    words: Sequence[str],
    others: Mapping[str, str] | None = None,
) -> int:
    """Run a `@hydra.main` function decorated by `runs` as a command. Return the exit code.

    Args:
        config_name: name of the configuration `configs/{config_name}.yaml`.
        words: the command line, Hydra's flags and overrides.
        help_text: description of the program, then a line `Examples:` and examples. `--help` inserts the settings
            between them.
        others: other configurations of the program, and the word of the command line that selects each.

    Raises:
        UserError: If the command line or the configuration is invalid. With HYDRA_FULL_ERROR=1, Hydra's own errors are
            raised instead.
    """
    register(config_name)
    OmegaConf.register_new_resolver("help", partial(_help, config_name, help_text), replace=True)
    flags, overrides = _split(words)
    is_sweep = bool({"-m", "--multirun"} & set(flags))
    wants_full_errors = os.environ.get("HYDRA_FULL_ERROR") == "1"
    arguments = sys.argv
    reports_errors = logging.raiseExceptions
    logging.raiseExceptions = False  # Hydra logs its `--info`; a closed pipe, as with `head`, is not a logging error
    sys.argv = [arguments[0], "--config-name", config_name, *prepared(config_name, overrides, is_sweep), *flags]
    try:
        one_line = nullcontext() if wants_full_errors else explained(config_name, overrides, others)
        with one_line, env_override({"HYDRA_FULL_ERROR": "1"}):  # errors are raised, not printed
            program()
    except Failed as failure:
        return failure.args[0]
    except Ended as end:
        if isinstance(end.__cause__, UserError):
            raise end.__cause__ from None
        return end.args[0]
    finally:
        sys.argv = arguments
        logging.raiseExceptions = reports_errors
    return 0


def _use_output_dir(config: DictConfig, key: str) -> None:
    """Set the setting `key` to Hydra's output folder, if that is not the working directory."""
    chosen = Path(HydraConfig.get().runtime.output_dir)
    if chosen == Path.cwd():
        return
    config[key] = str(chosen.relative_to(Path.cwd()) if chosen.is_relative_to(Path.cwd()) else chosen)
    print(f"{key}={config[key]}: {' '.join(HydraConfig.get().overrides.task)}", flush=True)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into Hydra's flags, with their values, and overrides."""
    known = get_args_parser()._option_string_actions
    flags = []
    overrides = []
    remaining = deque(words)
    while remaining:
        word = remaining.popleft()
        if not word.startswith("-"):
            overrides.append(word)
            continue
        name, _, value = word.partition("=")
        if name not in known:
            raise UserError(f"unknown option {name}: settings are written key=value; --help lists them")
        flags.append(word)
        takes_value = known[name].nargs != 0 and not value
        if takes_value and remaining and "=" not in remaining[0]:
            flags.append(remaining.popleft())
    return flags, overrides


# --- help ---


def _help(config_name: str, text: str, *, _root_: DictConfig) -> str:
    """Return the text of `--help`. This is the resolver `${help:}` in Hydra's help template of configs/program.yaml."""
    description, _, examples = text.partition("Examples:")
    choices = {group: choice for group, choice in _root_.hydra.runtime.choices.items() if not group.startswith("hydra")}
    config = OmegaConf.masked_copy(_root_, [key for key in _root_ if key != "hydra"])
    paragraphs = [" ".join(paragraph.split()) for paragraph in description.strip().split("\n\n")]
    lines = ["\n\n".join(textwrap.fill(paragraph, _width(), break_on_hyphens=False) for paragraph in paragraphs)]
    lines += ["", "Settings, as key=value (default):"]
    lines += _table(_settings(config_name, config, choices))
    for group, choice in choices.items():
        lines += ["", f"{group}=..." + (f" ({choice})" if choice else "") + ":"]
        folder = CONFIGS / group.partition("@")[0]
        lines += _table([(option, _headline(folder / f"{option}.yaml")) for option in options(group)])
    lines += ["", "Hydra's options (all: --hydra-help):"]
    lines += _table(
        [
            (
                "--help",
                "this text"
                + ("; with experiment=NAME, the defaults of that recipe" if "experiment" in choices else ""),
            ),
            ("--cfg job", "print the composed configuration"),
            ("--info defaults", "print the defaults list of the configuration"),
            ("-m KEY=A,B", "run once per value, each in a numbered folder"),
        ]
    )
    if examples:
        lines += ["", "Examples:", *(f"  {line.strip()}" for line in examples.strip().splitlines())]
    return "\n".join(lines).replace("$", "$$")  # Hydra substitutes $NAME


def _settings(config_name: str, config: DictConfig, choices: dict[str, str]) -> list[tuple[str, str, str]]:
    """Return (key, default, description) of each setting that is described in its dataclass or in YAML."""
    comments = {}
    for group, choice in {"": config_name, **choices}.items():
        if choice:
            folder, _, package = group.partition("@")
            path = CONFIGS / folder / f"{choice}.yaml"
            package = package or folder.replace("/", ".")
            prefix = f"{package}." if package and "@package _global_" not in path.read_text() else ""
            comments |= {f"{prefix}{key}": comment for key, comment in _comments(path)}
    rows = []
    for key, value in walk(config):
        field = find_field(config_name, key)
        sentence = field[0].metadata.get("about") if field else comments.get(key)
        if sentence:
            rows.append((key, _printed(value), sentence))
    return rows


def _comments(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, comment) for the lines of a YAML file, after those of its base files."""
    text = path.read_text()
    for base in re.findall(r"^\s*-\s+(\w+)\s*$", text.partition("defaults:")[2], re.MULTILINE):
        if base != "_self_" and (path.parent / f"{base}.yaml").is_file():
            yield from _comments(path.parent / f"{base}.yaml")
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = re.match(r"^(\s*)([A-Za-z_]\w*):(.*)$", line)
        if not match:
            continue
        indent = len(match[1])
        while stack and stack[-1][0] >= indent:
            stack.pop()
        stack.append((indent, match[2]))
        comment = re.search(r"\s#\s*(.+)$", match[3])
        if comment:
            yield ".".join(name for _, name in stack), comment[1].strip()


def _headline(path: Path) -> str:
    """Return the first sentence of the comment at the start of a YAML file, without the `@package` line."""
    lines = [line for line in path.read_text().splitlines() if "@package" not in line]
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"\.(?:\s|$)", comment, maxsplit=1)[0]


def _width() -> int:
    """Return the terminal width for wrapping help text."""
    return max(80, min(shutil.get_terminal_size((120, 24)).columns, 140))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table whose last column is wrapped to the terminal width."""
    columns = [min(36, max((len(row[i]) for row in rows), default=0)) for i in range(len(rows[0]) - 1)] if rows else []
    lines = []
    for *cells, sentence in rows:
        start = "  " + "".join(f"{cell:<{column}}  " for cell, column in zip(cells, columns))
        rest = " " * (2 + sum(column + 2 for column in columns))
        wrapped = textwrap.wrap(sentence, max(30, _width() - len(rest)), break_on_hyphens=False) or [""]
        lines.append((start + wrapped[0]).rstrip())
        lines += [rest + line for line in wrapped[1:]]
    return lines


def _printed(value: Any) -> str:
    if value == "???":
        return "needed"
    if isinstance(value, dict):
        return ""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")
