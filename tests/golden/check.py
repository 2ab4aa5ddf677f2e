"""A golden case's outputs compared with the stored ones.

`python -m tests.golden.check all FILE ...` prints a line a case and a summary, with `failed` those that do not pass
alone; exit code 1 if there are such. `scripts/check_golden.py` calls it.
"""

import importlib
import pkgutil
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.golden import runners as golden

for module in pkgutil.iter_modules(golden.__path__):  # each registers its runners
    importlib.import_module(f"{golden.__name__}.{module.name}")

# relative tolerance by kind of case
FORMULA = 1e-5
SMALL = 1e-4
FULL = 5e-4
ROUNDING = 2e-6  # of an output's largest magnitude, where a case measured how it amplifies rounding
PICTURE = 1e-3  # fraction of a uint8 picture's values that rounding may leave one level off
FULL_SIZE = 20_000_000  # weights from which a network counts as full-size
VERDICTS = ("pass", "FAIL", "not built")


class NoRunner(Exception):
    pass


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
    expected = expected.double()
    actual = actual.double()
    same_infinity = (expected == actual) & expected.isinf()
    error = torch.where(same_infinity, 0.0, (expected - actual).abs())
    worst = error.max().item() if error.numel() else 0.0
    magnitude = expected[~expected.isinf()].abs()
    scale = magnitude.mean().item() if expected.numel() else 0.0
    floor = stated(case.meta.get("noise_f32"), name)
    sensitivity = case.meta.get("sensitivity")
    if isinstance(sensitivity, dict) and "max_abs_change" in sensitivity:
        floor = stated(sensitivity["max_abs_change"], name)
        tolerance = max(FORMULA, 10 * floor, ROUNDING * magnitude.max().item() if expected.numel() else 0.0)
    else:
        tolerance = max(relative_tolerance(case) * scale, 20 * floor, 10 * stated(sensitivity, name), 1e-12)
    return Comparison(name, worst, worst / max(scale, 1e-30), tolerance if worst == worst else -1.0, floor)


def stated(metadata: Any, name: str) -> float:
    """Return the number that metadata state for an output, if they do: for all, by output, or as its `max_abs`."""
    value = metadata.get(name) if isinstance(metadata, dict) else metadata
    return float((value.get("max_abs") if isinstance(value, dict) else value) or 0.0)


def check(case: golden.Case) -> list[Comparison]:
    """Run a case; every stored output must be produced or openly skipped.

    Raises:
        NoRunner: nothing runs this component.
        ValueError: If an output is missing or has another number of elements.
    """
    run = golden.find_runner(case.name, case.meta)
    if run is None:
        raise NoRunner("no runner for this component yet")
    produced = run(case)
    missing = case.outputs.keys() - produced.keys() - case.skipped.keys()
    if missing:
        raise ValueError(f"outputs that nothing produced: {', '.join(sorted(missing))}")
    return [compare(case, name, produced[name]) for name in case.outputs if name in produced]


def run(file: Path) -> tuple[str, str, Exception | None]:
    """Run the case of a file; return its verdict, the line about it, and the error that ended it, if one did."""
    start = time.monotonic()
    skipped = {}
    results = []
    caught = None
    try:
        case = golden.load_case(file)
        skipped = case.skipped
        results = check(case)
    except Exception as error:
        caught = error
    if isinstance(caught, NoRunner) or needs_extra(caught):
        return "not built", f"not built  {file.stem}: {caught}", caught
    failed = [result for result in results if not result.passed]
    verdict = "FAIL" if failed or caught else "pass"
    numbers = "no numbers"
    if results:
        worst = max(results, key=lambda r: r.absolute / max(r.tolerance, 1e-30))
        numbers = f"abs {worst.absolute:.2e} rel {worst.relative:.2e} floor {worst.floor:.1e} ({worst.output})"
    line = f"{verdict}       {file.stem}: {numbers}, {len(results)} outputs"
    line += f", {time.monotonic() - start:.1f} s"
    line += "".join(f"; {r.output} off by {r.absolute:.2e}, allowed {r.tolerance:.2e}" for r in failed)
    line += f"; {type(caught).__name__}: {' '.join(str(caught).split())}" if caught else ""
    line += "".join(f"; {name} not compared: {why}" for name, why in skipped.items())
    return verdict, line, caught


def needs_extra(error: Exception | None) -> bool:
    """Return whether the case needs a package that is not installed."""
    return isinstance(getattr(error, "__cause__", None), ImportError)


def main(shown: str, *files: str) -> int:
    counts = Counter()
    for file in files:
        verdict, line, error = run(Path(file))
        counts[verdict] += 1
        if verdict != "pass" or shown == "all":
            print(line, flush=True)
        if verdict == "FAIL" and error and not isinstance(error, ValueError):
            traceback.print_exception(error)
    print("{} passed, {} failed, {} not built".format(*(counts[verdict] for verdict in VERDICTS)))
    return int(counts["pass"] < len(files))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
