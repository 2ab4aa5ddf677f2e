"""Every golden case, through the product. `scripts/check_golden.py DIR` runs this file over other folders."""

from __future__ import annotations

import time

import pytest

from tests.golden.check import NoRunner, check
from tests.golden.runners import load_case


def test_case(golden_file, record_property):
    """Passes when every stored output is met.

    The report gets three properties: `verdict` (pass, FAIL, not built), `line` (what `check_golden.py` prints) and
    `broke` (the case ended in an error that needs a traceback).
    """
    start = time.monotonic()
    skipped, results, caught = {}, [], None
    try:
        case = load_case(golden_file)
        skipped = case.skipped
        results = check(case)
    except Exception as error:  # reported in the line, then raised
        caught = error
    missing = isinstance(caught, NoRunner) or isinstance(getattr(caught, "__cause__", None), ImportError)
    failed = [result for result in results if not result.passed]
    verdict = "not built" if missing else "FAIL" if failed or caught else "pass"
    if missing:
        line = f"{verdict}  {golden_file.stem}: {caught}"
    else:
        worst = max(results, key=lambda r: r.absolute / max(r.tolerance, 1e-30), default=None)
        numbers = (
            f"abs {worst.absolute:.2e} rel {worst.relative:.2e} floor {worst.floor:.1e} ({worst.output})"
            if worst
            else "no numbers"
        )
        line = (
            f"{verdict}       {golden_file.stem}: {numbers}, {len(results)} outputs, {time.monotonic() - start:.1f} s"
        )
        line += "".join(f"; {r.output} off by {r.absolute:.2e}, allowed {r.tolerance:.2e}" for r in failed)
        line += f"; {type(caught).__name__}: {' '.join(str(caught).split())}" if caught else ""
        line += "".join(f"; {name} not compared: {why}" for name, why in skipped.items())
    record_property("verdict", verdict)
    record_property("line", line)
    record_property("broke", caught is not None and not missing and not isinstance(caught, ValueError))
    if missing and not isinstance(caught, NoRunner):
        pytest.skip(line)
    if caught and not missing:
        raise caught
    if verdict != "pass":
        pytest.fail(line, pytrace=False)
