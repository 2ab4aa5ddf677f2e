"""Compare this project with reference values of the official programs.

    python scripts/check_golden.py DIR [DIR ...] [--only PREFIX] [--quiet]

Prints a line for each case: worst absolute and relative error, the case's own float32 rounding error, pass or fail.
Exit code: 0 if all cases pass, 1 if a case fails or has no runner, 2 for invalid input such as a damaged file.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import json
import subprocess
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open

from engine.arguments import Parser
from engine.errors import UserError, run_cli
from engine.files import CHECKOUT
from engine.processes import script_environment


def check_file(path: Path) -> None:
    """Raise a `UserError` unless `path` and the list of keys beside it can be read."""
    keys = path.with_name(f"{path.stem}.keys.json")
    try:
        with safe_open(path, "np") as file:
            meta = json.loads((file.metadata() or {})["meta"])
        shapes = json.loads(keys.read_text())
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} and {keys.name} are not a golden case, or damaged: {error!r}") from error
    if not isinstance(meta, dict) or not isinstance(shapes, dict):
        raise UserError(f"{path} and {keys.name} are not a golden case: metadata and keys must be JSON objects")


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder with CASE.safetensors files")
    parser.add_argument("--only", default="", metavar="PREFIX", help="run only cases whose name starts with PREFIX")
    parser.add_argument("--quiet", action="store_true", help="print failures and the summary only")
    args = parser.parse_args()
    for folder in args.folders:
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}")
    files = [path.resolve() for folder in args.folders for path in sorted(folder.rglob("*.safetensors"))]
    files = [path for path in files if path.stem.startswith(args.only)]
    if not files:
        raise UserError(f"no case (*.safetensors) under {', '.join(map(str, args.folders))} starts with {args.only!r}")
    for path in files:
        check_file(path)
    command = [sys.executable, "-m", "tests.golden.check", "failed" if args.quiet else "all", *map(str, files)]
    return subprocess.run(command, cwd=CHECKOUT, env=script_environment()).returncode and 1


if __name__ == "__main__":
    run_cli(main)
