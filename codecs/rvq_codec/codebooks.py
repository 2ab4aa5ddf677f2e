"""Codebook maintenance: k-means initialisation, restarts of dead codes, usage statistics.

Axes: B batch, M vectors, C latent channels, D code channels, K codes per codebook, Q levels, T frames.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.device import to_device
from rvq_codec.quantizer import ResidualQuantizer


def kmeans(x: Tensor, count: int, normalize: bool, generator: torch.Generator) -> Tensor:
    """Compute centres (count, D) of vectors (M, D) by k-means, with cosine distance if `normalize`. Centres are means
    of the vectors.

    Empty clusters restart from random vectors.
    """
    keys = F.normalize(x, dim=-1) if normalize else x
    centres = x[torch.randint(len(x), (count,), generator=generator)]
    for _ in range(20):
        rows = F.normalize(centres, dim=-1) if normalize else centres
        nearest = (rows.square().sum(-1) - 2 * keys @ rows.T).argmin(-1)
        size = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        fresh = x[torch.randint(len(x), (count,), generator=generator)]
        centres = torch.where(size[:, None] > 0, sums / size.clamp_min(1)[:, None], fresh)
    return centres


@torch.no_grad()
def warm_start(
    quantizer: ResidualQuantizer,
    latents: Tensor,
    generator: torch.Generator,
    first_levels: int = 0,
    first_channels: int = 0,
) -> None:
    """Initialise every level from latents (M, C).

    Projections are the first D principal axes of the residual of the previous levels, and the codebook is computed from
    the projected residual by k-means.

    All code vectors are scaled by one number that gives those of the first level unit variance, so that the losses of
    the quantiser do not depend on the scale of the latents.

    Args:
        first_levels, first_channels: the first `first_levels` levels only use the first `first_channels` channels.
    """
    residual = latents
    scale = None
    for i, level in enumerate(quantizer.quantizers):
        if level.projected:
            dim = level.codebook.embedding_dim
            seen = first_channels if i < first_levels else residual.shape[1]
            mean = torch.zeros_like(residual[0])
            axes = residual.new_zeros(residual.shape[1], dim)
            mean[:seen] = residual[:, :seen].mean(0)
            centred = (residual - mean)[:, :seen].double()
            values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
            axes[:seen] = vectors[:, -dim:].to(residual.dtype)
            if scale is None:
                scale = values[-dim:].mean().sqrt().to(residual.dtype)
            _set_conv(level.in_project, axes.T / scale, -(axes.T @ mean) / scale)
            _set_conv(level.out_project, axes * scale, mean)
        e = level.in_project(residual.T[None])[0].T
        level.codebook.weight.copy_(kmeans(e, level.codebook.num_embeddings, level.normalize, generator))
        residual = residual - level(residual.T[None])[0][0].T


def _set_conv(conv, weight: Tensor, bias: Tensor) -> None:
    gain = torch.linalg.vector_norm(weight, dim=1)[:, None, None]
    conv.weight_g.copy_(gain)
    conv.weight_v.copy_(torch.where(gain > 0, weight[..., None], 1.0))  # a zero vector cannot be normalised
    conv.bias.copy_(bias)


@torch.no_grad()
def restart_dead_codes(quantizer: ResidualQuantizer, pool: Tensor, counts: Tensor, seed: int) -> None:
    """Replace every code with zero `counts` (Q, K) by a random projected residual of the latents in `pool` (M, C).

    Rows of `pool` that are zero have not been filled yet and are not drawn. To avoid synchronising with the host, a
    random number is drawn for every code, and the device uses those of the dead ones. The result equals that of
    `torch.randint` with a generator of this seed: 32-bit numbers of the Mersenne Twister, modulo the number of rows.
    """
    filled = pool.abs().sum(1) > 0
    rows = (~filled).byte().argsort(stable=True)  # filled rows first
    count = filled.sum()
    dead = (counts == 0) & (count > 0)
    draws = np.random.RandomState(seed).randint(0, 2**32, counts.numel(), dtype=np.uint32).astype(np.int64)
    nth = (dead.flatten().cumsum(0) - 1).clamp_min(0).view_as(dead)  # values of the dead codes
    chosen = rows[to_device(torch.from_numpy(draws), pool.device)[nth] % count.clamp_min(1)]
    residual = pool
    for i, level in enumerate(quantizer.quantizers):
        e = level.in_project(residual.T[None])[0].T
        level.codebook.weight.copy_(torch.where(dead[i, :, None], e[chosen[i]], level.codebook.weight))
        residual = residual - level(residual.T[None])[0][0].T


def count_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """Count each code of each level: codes (B, Q, T) -> (Q, K)."""
    flat = codes.transpose(0, 1).flatten(1)
    counts = flat.new_zeros(len(flat), codebook_size)
    return counts.scatter_add_(1, flat, torch.ones_like(flat))  # bincount would synchronise


def perplexity(counts: Tensor) -> Tensor:
    """Return the perplexity of each level's codes, from 1 to K: counts (Q, K) -> (Q,)."""
    p = counts.double() / counts.sum(-1, keepdim=True).clamp_min(1)
    return torch.special.entr(p).sum(-1).exp()
