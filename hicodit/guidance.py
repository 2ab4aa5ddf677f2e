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

Axes: B clips, K token levels, L token frames, M requested frames of a level, G guidance branches, N real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.precision import half_precision
from hicodit.conditions.types import Conditions
from hicodit.diffusion import LogLinearNoise, log_expm1
from hicodit.model import Conditioning, HiCoDiT
from hicodit.settings import GuidanceScales


@dataclass(frozen=True)
class GuidedPosterior:
    """The guided posterior of a batch of clips: all guidance branches in one forward pass.

    Attributes:
        model: the score network.
        conditioning: tensors that do not depend on the diffusion time. A CUDA graph of a step copies them, so that it
            can be reused for other clips.
        scales: guidance scales.
    """

    model: HiCoDiT
    conditioning: Conditioning
    scales: GuidanceScales

    def __call__(self, tokens: Tensor, t: Tensor, frames: Tensor | None) -> Tensor:
        """Return log q (B, K, M, N) or (B, K, L, N), see `samplers.Posterior`."""
        sigma = LogLinearNoise().sigma(t.float())
        positions = None
        if frames is not None:
            clip = torch.arange(len(tokens), device=tokens.device)[:, None]
            positions = [(clip, of_level) for of_level in frames.unbind(1)]
        with half_precision(tokens.device, self.model.dtype):
            log_p = self.model(tokens, sigma, self.conditioning, positions)  # log posteriors of each branch
        if frames is not None:
            batch, levels, count = frames.shape
            log_p = log_p.unflatten(1, (levels, batch, count)).transpose(1, 2)
        return combine(log_p, self.scales, -log_expm1(sigma)[:, None, None, None])


def guided_posterior(model: HiCoDiT, conditions: Conditions, scales: GuidanceScales) -> GuidedPosterior:
    """Prepare the guided posterior of a batch of clips: everything that does not depend on diffusion time."""
    with half_precision(conditions.lip.device, model.dtype):
        conditioning = model.prepare(conditions, scales.branches)
    return GuidedPosterior(model, conditioning, scales)


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
