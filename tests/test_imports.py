"""Imports respect the layers and have no cycle; the source root `codecs/` does not shadow Python's `codecs`."""

import ast
import os
import subprocess
import symtable
import sys
from graphlib import TopologicalSorter
from pathlib import Path

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


def product_modules() -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for unit in sorted(ALL - {"tests"}):
        for place in (ROOT / unit, ROOT / "codecs" / unit):
            for file in place.rglob("*.py"):
                parts = [unit, *file.relative_to(place).with_suffix("").parts]
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found | {name: ROOT / f"{name}.py" for name in ("train", "infer")}


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


def test_imports_respect_the_layers():
    modules = product_modules()
    assert len(modules) > 200
    assert [
        f"{module} imports {name}"
        for module, file in modules.items()
        for name in sorted(imported_units(file) & ALL - ALLOWED[module.split(".")[0]])
    ] == []


def test_imports_have_no_cycle():
    modules = product_modules()
    imports = {}
    for module, file in modules.items():
        places = {name if name in modules else name.rpartition(".")[0] for name in imported_names(file)}
        imports[module] = places & modules.keys() - {module}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names a circle


def test_imported_names_exist():
    """Also those that only a program without tests imports, such as one for a card."""
    modules = product_modules()
    known = set()
    for module, file in modules.items():
        table = symtable.symtable(file.read_text(), str(file), "exec")
        names = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
        known |= {module, *(f"{module}.{name}" for name in names)}
    assert [
        f"{module} imports {name}"
        for module, file in modules.items()
        for name in sorted(imported_names(file) - known)
        if name.split(".")[0] in ALL and name.rpartition(".")[0] in modules
    ] == []


def test_models_import_codecs_in_system_py_only():
    users = {
        file.relative_to(ROOT).as_posix()
        for model in MODELS
        for file in (ROOT / model).rglob("*.py")
        if imported_units(file) & CODECS
    }
    assert users <= {f"{model}/system.py" for model in MODELS}


def test_the_folder_codecs_does_not_shadow_the_standard_module(tmp_path):
    script = (
        "import codecs, rvq_codec, whisperx_vae, lia_x, engine, hicodit, talker_t2av\n"
        "assert codecs.lookup('utf-8').name == 'utf-8' and not hasattr(codecs, '__path__')\n"
        "assert '/codecs/' in rvq_codec.__file__.replace(chr(92), '/'), rvq_codec.__file__\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # what pip installed
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment, timeout=600)
