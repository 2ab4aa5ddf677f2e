"""EPFG: predictor-free guidance by several conditions at once (DEmoFace, arXiv 2502.01046; used by HiCoDiT).

Axes: G guidance branches, N real tokens. A branch is the network run with some conditions present and the rest null:
`none`, `all`, `identity`, `expression`, `lip`. The paper's displayed equation does not survive in any stored text, so
all four readings that its words allow are here. They differ in the exponent of the `none` branch:

    A  2 - w_all - W    product of the joint and the composed score
    B  1 - w_all - W    one base score plus guidance terms
    C  as A on posteriors, renormalised
    D  as B on posteriors, renormalised (the default: w_all = 1 and all others 0 is the conditional model itself)

with W = w_identity + w_expression + w_lip. A and B act on scores, which carry the odds a / (1 - a) of a token being
unmasked: A squares that factor, so it changes the reveal schedule even without guidance; under B the total rate is
free.
C and D keep the schedule (arXiv 2507.08965 on why that matters).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.bounds import bounded, check_bounds
from engine.errors import UserError

READINGS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class GuidanceScales:
    """The four scales and the reading of the formula. HiCoDiT: LRS3 2.5, 1.25, 1.5, 2.0; LRS2 2.25 for `all`.

    late: guidance acts while at most this share of a clip's tokens is masked; before, the conditional model is alone,
        which costs one branch (arXiv 2507.08965). The paper: 1, always.
    """

    all: float = bounded(-100.0, 100.0, default=1.0)
    identity: float = bounded(-100.0, 100.0, default=0.0)
    expression: float = bounded(-100.0, 100.0, default=0.0)
    lip: float = bounded(-100.0, 100.0, default=0.0)
    reading: str = "D"
    late: float = bounded(0.0, 1.0, default=1.0)

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise UserError(f"guidance.reading={self.reading!r} is not one of {', '.join(READINGS)}")
        check_bounds(self, "guidance.")
        if self.late < 1 and "all" not in self.branches:
            raise UserError(f"guidance.late={self.late} needs guidance.all other than 0")

    def exponents(self) -> dict[str, float]:
        """Exponent of each branch; one of zero drops its branch."""
        singles = self.identity + self.expression + self.lip
        base = 2.0 if self.reading in "AC" else 1.0
        values = {"none": base - self.all - singles, "all": self.all}
        values |= {"identity": self.identity, "expression": self.expression, "lip": self.lip}
        return {branch: value for branch, value in values.items() if value != 0}

    @property
    def branches(self) -> tuple[str, ...]:
        """Branches that have to be computed."""
        return tuple(self.exponents())


def combine(log_p: Tensor, scales: GuidanceScales, log_odds: Tensor | None = None) -> Tensor:
    """Combine branch log posteriors (G, ..., N), in the order of `scales.branches`, into one (..., N).

    Readings C and D return a normalised log posterior. A and B return the log of an unnormalised one, to which
    `log_odds` = log(a / (1 - a)) = -log(exp(sigma) - 1), of a shape that broadcasts against (..., N), contributes the
    powers of the unmasking odds that the product of scores carries beyond the first.
    """
    weights = list(scales.exponents().values())
    out = torch.einsum("g,g...->...", torch.tensor(weights, dtype=log_p.dtype, device=log_p.device), log_p)
    if scales.reading in "CD":
        return out.log_softmax(-1)
    extra_powers = sum(weights) - 1  # 1 for A, 0 for B
    return out + extra_powers * log_odds if log_odds is not None else out
