"""The first training steps of every task give the losses that are in git; see `golden_runs`."""

import json

import pytest
from golden_runs import FOLDER, RUNS, losses_of, machine

# On another processor or torch, sums are taken in another order. In float32 that moved these figures by at most 2e-5 of
# their size (SSIM of LIA-X; the others by 6e-6) when AVX2 and baseline kernels were forced on an AVX-512 machine. Norms
# of gradients move more: the RVQ codec's in its third step by 1.4e-4, between an AMD and an Intel processor.
TOLERANCE = 1e-4
NORM_TOLERANCE = 5e-4
SMALL = 1e-6  # nothing at all beside the losses, of the order of one


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_in_git(name):
    golden = json.loads((FOLDER / f"{name}.json").read_text())
    expected = figures(golden["steps"])
    how = "every digit counts"
    if golden["machine"] != machine():
        how = f"within {TOLERANCE}, as {machine()} is another machine"
        for figure, value in expected.items():
            allowed = NORM_TOLERANCE if figure.endswith("grad_norm") else TOLERANCE
            expected[figure] = pytest.approx(value, rel=allowed, abs=SMALL)
    remedy = f"if that is meant, run  python -m tests.golden.golden_runs {name}  and say why in the commit"
    assert figures(losses_of(name)) == expected, f"training of {name} changed ({how}); {remedy}"


def figures(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the figures of all steps by step and name."""
    return {f"step {step['step']:.0f}: {name}": value for step in steps for name, value in step.items()}
