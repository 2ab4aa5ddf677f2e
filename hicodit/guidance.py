"""EPFG: predictor-free guidance by several conditions at once (DEmoFace, arXiv 2502.01046; used by HiCoDiT).

Axes: G guidance branches, M positions, N real tokens. A branch is the network run with some conditions present and the
rest null: `none`, `all`, `identity`, `expression`, `lip`. The paper's displayed equation does not survive in any stored
text, so all four readings that its words allow are here. They differ in the exponent of the `none` branch:

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

import torch
from torch import Tensor

from hicodit.settings import GuidanceScales


def combine(log_p: Tensor, scales: GuidanceScales, log_odds: Tensor | None = None) -> Tensor:
    """Combine branch log posteriors (G, ..., N), in the order of `scales.branches`, into one (..., N).

    Readings C and D return a normalised log posterior. A and B return the log of an unnormalised one, to which
    `log_odds` = log(a / (1 - a)) = -log(exp(sigma) - 1), of a shape that broadcasts against (..., N), contributes the
    powers of the unmasking odds that the product of scores carries beyond the first.
    """
    weights = list(scales.exponents().values())
    out = weights[0] * log_p[0]
    for weight, branch in zip(weights[1:], log_p[1:]):
        out = torch.add(out, branch, alpha=weight)
    if scales.reading in "CD":
        return out.log_softmax(-1)
    extra_powers = sum(weights) - 1  # 1 for A, 0 for B
    return out + extra_powers * log_odds if log_odds is not None else out
