"""Imports point one way and never in a circle; only `system.py` of a model imports codecs; the source root `codecs/`
leaves Python's own module of that name alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Collection
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


def imported_names(tree: ast.AST) -> set[str]:
    """Top-level names that a module imports, by statement or `import_module("...")`; relative imports stay inside."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names.add(node.args[0].value.split(".")[0])
    return names


def violations(root: Path) -> list[str]:
    """`file imports package` for every import against the arrows."""
    found = []
    for unit, allowed in ALLOWED.items():
        places = [root / unit, root / "codecs" / unit, root / f"{unit}.py"]
        files = [f for place in places for f in ([place] if place.suffix == ".py" else sorted(place.rglob("*.py")))]
        for file in files:
            if file.is_file():
                wrong = imported_names(ast.parse(file.read_text())) & ALL - allowed
                found += [f"{file.relative_to(root)} imports {name}" for name in sorted(wrong)]
    return found


def test_no_import_runs_backwards():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("engine/metrics/new.py", "import hicodit.task"),
        ("hicodit/new.py", "def f():\n    from talker_t2av import model"),
        ("hicodit/new.py", "import importlib\nimportlib.import_module('talker_t2av.task')"),
        ("service/new.py", "from scripts import serve"),
    ],
)
def test_the_check_sees_a_backward_import(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert len(violations(tmp_path)) == 1
    path.write_text("from engine import errors\nfrom . import sibling\nimport numpy")
    assert violations(tmp_path) == []


def product_modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for unit in sorted(ALL - {"tests"}):
        for place in (root / unit, root / "codecs" / unit):
            for file in place.rglob("*.py"):
                parts = [unit, *file.relative_to(place).with_suffix("").parts]
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found | {name: root / f"{name}.py" for name in ("train", "infer") if (root / f"{name}.py").is_file()}


def imported_modules(file: Path, modules: Collection[str]) -> set[str]:
    """Those of `modules` that a file imports: at its top, in functions, and under TYPE_CHECKING."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & set(modules) or {node.module}
    return names & set(modules)


def circles(root: Path) -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others."""
    modules = product_modules(root)
    imports = {name: imported_modules(file, modules) - {name} for name, file in modules.items()}

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


def test_no_imports_run_in_a_circle():
    assert circles(ROOT) == []


@pytest.mark.parametrize(
    "line",
    [
        "from engine import one",
        "import engine.one",
        "def f():\n    from engine.one import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from engine.one import x",
    ],
)
def test_the_check_sees_a_circle(tmp_path, line):
    for name, text in {"one": "from engine.two import y", "two": "import engine.three", "three": line}.items():
        (tmp_path / "engine").mkdir(exist_ok=True)
        (tmp_path / "engine" / f"{name}.py").write_text(text)
    assert circles(tmp_path) == [["engine.one", "engine.three", "engine.two"]]
    (tmp_path / "engine" / "three.py").write_text("from engine import four")
    assert circles(tmp_path) == []


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


def test_every_imported_name_is_there():
    assert missing_names(ROOT) == []


def test_the_check_sees_a_name_that_is_gone(tmp_path):
    files = {
        "__init__.py": "",
        "one.py": "try:\n    import json\nexcept ImportError:\n    A: int = 1\nB, C = 2, 3",
        "two.py": "def f():\n    from engine.one import A, B, D, json\nfrom engine import one",
    }
    (tmp_path / "engine").mkdir()
    for name, text in files.items():
        (tmp_path / "engine" / name).write_text(text)
    assert missing_names(tmp_path) == ["engine/two.py: engine.one.D"]


def test_models_know_codecs_by_their_table_alone():
    users = {
        file.relative_to(ROOT).as_posix()
        for model in MODELS
        for file in (ROOT / model).rglob("*.py")
        if imported_names(ast.parse(file.read_text())) & CODECS
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
