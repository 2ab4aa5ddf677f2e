"""Imports point one way and never in a circle; only `system.py` of a model imports codecs; the source root `codecs/`
leaves Python's own module of that name alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODECS = {"rvq_codec", "whisperx_vae", "lia_x"}
MODELS = {"hicodit", "talker_t2av"}
TOP = ("scripts", "benchmarks", "service", "train", "infer")
ALL = CODECS | MODELS | {"engine", "corpora", "tests", *TOP}
ALLOWED = {
    "engine": {"engine"},
    **{codec: {codec, "engine"} for codec in CODECS},
    **{model: {model, "engine"} | CODECS for model in MODELS},
    "corpora": {"corpora", "engine"} | CODECS | MODELS,
    **{top: {"scripts", "benchmarks", "service", "corpora", "engine"} | CODECS | MODELS for top in TOP},
    "service": {"service", "corpora", "engine"} | CODECS | MODELS,
}


def product_modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for unit in sorted(ALL - {"tests"}):
        for place in (root / unit, root / "codecs" / unit):
            for file in place.rglob("*.py"):
                parts = [unit, *file.relative_to(place).with_suffix("").parts]
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found | {name: root / f"{name}.py" for name in ("train", "infer") if (root / f"{name}.py").is_file()}


def imported_names(file: Path) -> set[str]:
    """Dotted names that a file imports by statement or `import_module("...")`: `a.b` for `from a import b`. Those in
    functions and under TYPE_CHECKING count; relative imports stay inside.
    """
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names.add(node.args[0].value)
    return names


def imported_units(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(file)}


def violations(root: Path) -> list[str]:
    """`module imports package` for every import against the arrows."""
    return [
        f"{module} imports {name}"
        for module, file in product_modules(root).items()
        for name in sorted(imported_units(file) & ALL - ALLOWED[module.split(".")[0]])
    ]


def circles(root: Path) -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others."""
    modules = product_modules(root)
    imports = {}
    for module, file in modules.items():
        places = {name if name in modules else name.rpartition(".")[0] for name in imported_names(file)}
        imports[module] = places & modules.keys() - {module}

    def reach(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            new = imports[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reached = {name: reach(name) for name in modules}
    groups = {tuple(sorted(other for other in reached[name] if name in reached[other])) for name in modules}
    return [list(group) for group in sorted(groups) if group]


def missing_names(root: Path) -> list[str]:
    """`file: module.name` for every name that a product file or a test imports from a module that has it not."""
    modules, found = product_modules(root), []
    defined = {name: names_of(ast.parse(file.read_text()).body) for name, file in modules.items()}
    for file in [*modules.values(), *sorted((root / "tests").rglob("*.py"))]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module in modules:
                names = {alias.name for alias in node.names} - defined[node.module]
                lost = (f"{node.module}.{name}" for name in sorted(names) if f"{node.module}.{name}" not in modules)
                found += [f"{file.relative_to(root)}: {name}" for name in lost]
    return found


def names_of(body: list[ast.stmt]) -> set[str]:
    """Names that statements of a module bind, also inside of `if`, `try` and `with`."""
    names = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        else:
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and type(part.ctx) is ast.Store}
            names |= names_of([part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt)])
    return names


@pytest.mark.parametrize("check", [violations, circles, missing_names])
def test_imports_are_in_order(check):
    assert check(ROOT) == []


TYPED = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from engine.one import A"


@pytest.mark.parametrize(
    ("check", "file", "line", "found"),
    [
        (violations, "engine/metrics/new.py", "import hicodit.task", 1),
        (violations, "hicodit/new.py", "def f():\n    from talker_t2av import model", 1),
        (violations, "hicodit/new.py", "import importlib\nimportlib.import_module('talker_t2av.task')", 1),
        (violations, "service/new.py", "from scripts import serve", 1),
        (violations, "service/new.py", "from engine import errors\nfrom . import sibling\nimport numpy", 0),
        (circles, "engine/three.py", "from engine import one", 1),
        (circles, "engine/three.py", "import engine.one", 1),
        (circles, "engine/three.py", "def f():\n    from engine.one import A", 1),
        (circles, "engine/three.py", TYPED, 1),
        (circles, "engine/three.py", "from engine import four", 0),
        (missing_names, "engine/three.py", "def f():\n    from engine.one import A, B, D, json", 1),
        (missing_names, "engine/three.py", "from engine import one\nfrom engine.one import A, B, C, json", 0),
    ],
)
def test_a_check_sees_what_is_wrong(tmp_path, check, file, line, found):
    one = "from engine.two import y\ntry:\n    import json\nexcept ImportError:\n    A: int = 1\nB, C = 2, 3"
    two = "import engine.three\ny = 1"
    for name, text in {"engine/__init__.py": "", "engine/one.py": one, "engine/two.py": two, file: line}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert len(check(tmp_path)) == found


def test_models_know_codecs_by_their_table_alone():
    users = {
        file.relative_to(ROOT).as_posix()
        for model in MODELS
        for file in (ROOT / model).rglob("*.py")
        if imported_units(file) & CODECS
    }
    assert users <= {f"{model}/system.py" for model in MODELS}


def test_the_source_root_codecs_leaves_the_standard_module_alone(tmp_path):
    script = (
        "import codecs, rvq_codec, whisperx_vae, lia_x, engine, hicodit, talker_t2av\n"
        "assert codecs.lookup('utf-8').name == 'utf-8' and not hasattr(codecs, '__path__')\n"
        "assert '/codecs/' in rvq_codec.__file__.replace(chr(92), '/'), rvq_codec.__file__\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # what pip installed
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment, timeout=600)
