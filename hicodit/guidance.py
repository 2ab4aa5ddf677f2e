"""Enhanced predictor-free guidance by several conditions (DEmoFace, arXiv 2502.01046; used by HiCoDiT).

A guidance branch is the network run with some conditions present and the others null: `none`, `all`, `identity`,
`expression`, `lip`. The guided score is the joint score times the composed score. The paper's displayed equation does
not survive in any stored text, so that two forms of it are offered. With W = w_identity + w_expression + w_lip:

- `literal` multiplies the scores of both. The exponent of the `none` branch is 2 - w_all - W. A score carries the odds
  a / (1 - a) of a token being unmasked, and the product squares them: the form changes the unmasking schedule even
  without guidance, and needs a sampler that follows the total rate (`sampler.method=euler`).
- `normalised` (the default) weights the posteriors instead, with 1 - w_all - W for `none`, and renormalises. w_all = 1
  and all others 0 is the conditional model itself, and the schedule stays (arXiv 2507.08965 on why that matters).

docs/reproduce.md has the command that compares the two on a validation split.

Axes: G guidance branches, N real tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hicodit.settings import GuidanceScales


def combine(log_p: Tensor, scales: GuidanceScales, log_odds: Tensor | None = None) -> Tensor:
    """Combine branch log posteriors (G, ..., N), in the order of `scales.branches`, into one (..., N).

    The normalised form returns a log posterior. The literal form returns the log of an unnormalised one.

    Args:
        log_odds: log(a / (1 - a)) = -log(exp(sigma) - 1), of a shape that broadcasts against (..., N). The literal form
            adds the powers of the unmasking odds that the product of scores carries beyond the first; None: none.
    """
    exponents = list(scales.exponents().values())
    out = exponents[0] * log_p[0]
    for exponent, branch in zip(exponents[1:], log_p[1:]):
        out = torch.add(out, branch, alpha=exponent)
    if scales.guidance_form == "normalised":
        return out.log_softmax(-1)
    extra_powers = sum(exponents) - 1
    return out if log_odds is None else out + extra_powers * log_odds
