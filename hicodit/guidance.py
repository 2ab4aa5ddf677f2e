"""Enhanced predictor-free guidance with several conditions (DEmoFace, arXiv 2502.01046; used by HiCoDiT).

A guidance branch is an evaluation of the network with some conditions and null conditions otherwise: `none`, `all`,
`identity`, `expression`, `lip`. The guided score is the product of the joint score and the composed score. The paper's
equation is ambiguous, so that two forms of it are implemented. With W = w_identity + w_expression + w_lip:

- `literal` multiplies the scores of both. The exponent of the `none` branch is 2 - w_all - W. A score contains the odds
  a / (1 - a) of a token being unmasked, which the product squares. This form therefore changes the unmasking schedule
  even without guidance, and requires a sampler that follows the total rate (`sampler.method=euler`).
- `normalised` (the default) weights the posteriors instead, with 1 - w_all - W for `none`, and renormalises. With w_all
  = 1 and all others 0 it is the conditional model. The unmasking schedule is unchanged (see arXiv 2507.08965).

See docs/reproduce.md for a comparison of both forms on a validation split.

Axes: G guidance branches, N real tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hicodit.settings import GuidanceScales


def combine(log_p: Tensor, scales: GuidanceScales, log_odds: Tensor | None = None) -> Tensor:
    """Combine the log posteriors of the branches (G, ..., N), in the order of `scales.branches`, into one (..., N).

    The normalised form returns log posteriors, the literal form unnormalised ones.

    Args:
        log_odds: log(a / (1 - a)) = -log(exp(sigma) - 1), of a shape that broadcasts against (..., N). The literal form
            adds the additional powers of the unmasking odds in the product of scores. None: no odds.
    """
    exponents = list(scales.exponents().values())
    out = exponents[0] * log_p[0]
    for exponent, branch in zip(exponents[1:], log_p[1:]):
        out = torch.add(out, branch, alpha=exponent)
    if scales.guidance_form == "normalised":
        return out.log_softmax(-1)
    extra_powers = sum(exponents) - 1
    return out if log_odds is None else out + extra_powers * log_odds
