"""A golden case's outputs compared with the stored ones."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

import numpy as np
import torch

from tests.golden import runners as golden

for module in pkgutil.iter_modules(golden.__path__):  # each registers its runners
    importlib.import_module(f"{golden.__name__}.{module.name}")

FORMULA, SMALL, FULL = 1e-5, 1e-4, 5e-4  # relative tolerance by kind of case
ROUNDING = 2e-6  # of an output's largest magnitude, where a case measured how it amplifies rounding
PICTURE = 1e-3  # share of a uint8 picture's values that rounding may leave one level off
FULL_SIZE = 20_000_000  # weights from which a network counts as full-size


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
    """Run a case; every stored output must be produced or openly skipped.

    Raises:
        NoRunner: nothing runs this component.
        ValueError: an output is missing or has another number of elements.
    """
    run = golden.find_runner(case.name, case.meta)
    if run is None:
        raise NoRunner("no runner for this component yet")
    produced = run(case)
    missing = case.outputs.keys() - produced.keys() - case.skipped.keys()
    if missing:
        raise ValueError(f"outputs that nothing produced: {', '.join(sorted(missing))}")
    return [compare(case, name, produced[name]) for name in case.outputs if name in produced]
