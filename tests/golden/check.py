"""Run golden cases through this project's public classes and compare with the stored numbers.

    python scripts/check_golden.py DIR [DIR ...] [--only PREFIX] [--quiet]

One line a case: worst absolute and relative error, the case's own float32 noise floor, pass or fail. Exit code 1 when
a case fails or nothing ran it, 0 when all pass; cases of components that are not built yet count as not run.
"""

from __future__ import annotations

import argparse
import importlib
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from engine.errors import UserError, run_cli
from tests.golden import runners as golden

RUNNER_MODULES = (
    "diffusion",
    "guidance",
    "rvq",
    "whisperx_vae",
    "lia_x",
    "conditions",
    "faces",
    "voices",
    "talker",
    "talker_generation",
)
FORMULA, SMALL, FULL = 1e-5, 1e-4, 5e-4  # relative tolerance by kind of case
ROUNDING = 2e-6  # of an output's largest magnitude, where a case measured how it amplifies rounding
PICTURE = 1e-3  # share of a uint8 picture's values that rounding may leave one level off
FULL_SIZE = 20_000_000  # weights from which a network counts as full-size


@dataclass(frozen=True)
class Comparison:
    output: str
    absolute: float
    relative: float  # absolute error over the mean magnitude of the expected output
    tolerance: float  # absolute
    floor: float

    @property
    def passed(self) -> bool:
        return self.absolute <= self.tolerance


def relative_tolerance(case: golden.Case) -> float:
    """By kind: a formula, a small network, a full-size one."""
    size = sum(int(np.prod(shape)) for shape in case.keys.values())
    return FORMULA if size == 0 else SMALL if size < FULL_SIZE else FULL


def compare(case: golden.Case, name: str, value: object) -> Comparison:
    """One output against the stored one.

    Floats: within the kind's relative tolerance of the output's mean magnitude, or twenty times the case's float32
    floor, or ten times its stated sensitivity, whichever is larger. A case that measured how
    much rounding of its inputs changes an output allows ten times that, or 1e-5, or ROUNDING of the largest magnitude.
    Integers: equal, unless a stored margin says that the decision was a near tie; grey levels of pictures may differ by
    one in `PICTURE` of the pixels.
    """
    expected = case.outputs[name]
    actual = torch.as_tensor(value).detach().cpu()
    if actual.numel() != expected.numel():
        raise ValueError(f"{name}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    actual = actual.reshape(expected.shape)
    if not expected.is_floating_point():
        wrong = actual.to(expected.dtype) != expected
        if expected.dtype == torch.uint8:  # a picture: its official transform came out of another OpenCV's solver
            step = (actual.int() - expected.int()).abs()
            wrong &= (step > 1) | (wrong.double().mean() > PICTURE)
        margin = case.outputs.get("margin")
        if margin is not None and margin.shape == expected.shape:
            wrong &= margin > 1e-5
        share = wrong.double().mean().item() if wrong.numel() else 0.0
        return Comparison(name, float(wrong.sum()), share, 0.0, 0.0)
    expected, actual = expected.double(), actual.double()
    same_infinity = (expected == actual) & expected.isinf()
    error = torch.where(same_infinity, 0.0, (expected - actual).abs())
    worst = error.max().item() if error.numel() else 0.0
    scale = expected[~expected.isinf()].abs().mean().item() if expected.numel() else 0.0
    floor = (case.meta.get("noise_f32") or {}).get(name) or {}
    floor = float(floor.get("max_abs", 0.0)) if isinstance(floor, dict) else float(floor)
    sensitivity = case.meta.get("sensitivity") or 0.0
    if isinstance(sensitivity, dict) and "max_abs_change" in sensitivity:
        largest = expected[~expected.isinf()].abs().max().item() if expected.numel() else 0.0
        change = float(sensitivity["max_abs_change"].get(name, 0.0))
        tolerance = max(FORMULA, 10 * change, ROUNDING * largest)
        return Comparison(name, worst, worst / max(scale, 1e-30), tolerance if worst == worst else -1.0, change)
    sensitivity = sensitivity.get(name, 0.0) if isinstance(sensitivity, dict) else sensitivity
    if isinstance(sensitivity, dict):
        sensitivity = sensitivity.get("max_abs", 0.0)
    tolerance = max(relative_tolerance(case) * scale, 20 * floor, 10 * float(sensitivity), 1e-12)
    return Comparison(name, worst, worst / max(scale, 1e-30), tolerance if worst == worst else -1.0, floor)


def check(case: golden.Case) -> list[Comparison]:
    """Run a case; every stored output must be produced or openly skipped."""
    produced = golden.find_runner(case.name, case.meta)(case)
    missing = case.outputs.keys() - produced.keys() - case.skipped.keys()
    if missing:
        raise ValueError(f"outputs that nothing produced: {', '.join(sorted(missing))}")
    return [compare(case, name, produced[name]) for name in case.outputs if name in produced]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder with CASE.safetensors files")
    parser.add_argument("--only", default="", metavar="PREFIX", help="run only cases whose name starts with PREFIX")
    parser.add_argument("--quiet", action="store_true", help="print failures and the summary only")
    args = parser.parse_args()
    for module in RUNNER_MODULES:
        if (Path(__file__).parent / "runners" / f"{module}.py").is_file():
            importlib.import_module(f"tests.golden.runners.{module}")
    files = []
    for folder in args.folders:
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}")
        files += sorted(p for p in folder.rglob("*.safetensors") if p.stem.startswith(args.only))
    if not files:
        raise UserError(f"no case (*.safetensors) under {', '.join(map(str, args.folders))} starts with {args.only!r}")

    counts = {"pass": 0, "FAIL": 0, "not built": 0}
    for path in files:
        start, skipped = time.monotonic(), {}
        try:
            with safe_open(path, "pt") as file:
                meta = golden.read_meta(file)
            if golden.find_runner(path.stem, meta) is None:
                counts["not built"] += 1
                print(f"not built  {path.stem}: no runner for this component yet", flush=True)
                continue
            case = golden.load_case(path)
            skipped = case.skipped
            results = check(case)
            failed = [r for r in results if not r.passed]
            note = "".join(f"; {r.output} off by {r.absolute:.2e}, allowed {r.tolerance:.2e}" for r in failed)
        except Exception as error:  # a case that breaks is a failed case, and the others still run
            results, failed = [], [error]
            note = f"; {type(error).__name__}: {error}"
            if not isinstance(error, ValueError):
                traceback.print_exc()
        verdict = "FAIL" if failed else "pass"
        counts[verdict] += 1
        if verdict == "FAIL" or not args.quiet:
            worst = max(results, key=lambda r: r.absolute / max(r.tolerance, 1e-30), default=None)
            numbers = (
                f"abs {worst.absolute:.2e} rel {worst.relative:.2e} floor {worst.floor:.1e} ({worst.output})"
                if worst
                else "no numbers"
            )
            skipped = "".join(f"; {name} not compared: {why}" for name, why in skipped.items())
            seconds = time.monotonic() - start
            print(
                f"{verdict}       {path.stem}: {numbers}, {len(results)} outputs, {seconds:.1f} s{note}{skipped}",
                flush=True,
            )
    print(f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['not built']} not built")
    return 0 if counts["pass"] == len(files) else 1


if __name__ == "__main__":
    run_cli(main)
