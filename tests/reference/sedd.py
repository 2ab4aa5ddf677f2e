"""SEDD as its authors wrote it (arXiv 2310.16834): the absorbing graph, scores, samplers and a plain network.

The product uses the parts of this mathematics that remain when a network gives a normalised posterior; the golden cases
`sedd_*` certify both, and `test_sedd.py` ties them to each other.

Axes: B batch, L sequence, N real tokens (ids 0..N-1; id N is the mask), V = N + 1 columns.
Any leading shape works where a docstring says `...`; a time or noise level broadcasts against it from the left.
"""

import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hicodit.diffusion import LogLinearNoise, exponential_noise, log_expm1
from hicodit.layers import AdaLNBlock, ScaleNorm, TimeEmbedding, modulation_layer, rotary_table

# ------------------------------------------------------------------------------------------------ the absorbing graph


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Append dimensions to `value` until it broadcasts against `like` from the left."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def one_hot(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.one_hot(x, size).to(dtype)


def sample_categorical(weights: Tensor, u: Tensor) -> Tensor:
    """Draw an index in proportion to weights (..., V), by an exponential race on uniforms u of the same shape.

    Weights need not sum to one; a negative weight never wins.
    """
    return (weights / exponential_noise(u)).argmax(-1)


def rate(x: Tensor, mask_id: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Forward rate column of each token, (...) -> (..., V): one_hot(mask) - one_hot(x)."""
    return one_hot(torch.full_like(x, mask_id), mask_id + 1, dtype) - one_hot(x, mask_id + 1, dtype)


def transposed_rate(x: Tensor, mask_id: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Transposed rate row, (...) -> (..., V): -one_hot(x), plus 1 everywhere when x is the mask."""
    return (x == mask_id).unsqueeze(-1).to(dtype) - one_hot(x, mask_id + 1, dtype)


def transposed_transition(x: Tensor, sigma: Tensor, mask_id: int) -> Tensor:
    """Transposed transition row over a noise interval sigma, (...) -> (..., V); for the mask every column gains."""
    sigma = expand(sigma, x).unsqueeze(-1)
    row = torch.exp(-sigma) * one_hot(x, mask_id + 1, sigma.dtype)
    return row + torch.where((x == mask_id).unsqueeze(-1), 1 - torch.exp(-sigma), 0)


def reverse_rate(x: Tensor, score: Tensor, mask_id: int) -> Tensor:
    """Reverse rate row from x given scores (..., V); the diagonal makes the row sum to zero."""
    row = transposed_rate(x, mask_id, score.dtype) * score
    row = row.scatter(-1, x.unsqueeze(-1), 0)
    return row.scatter(-1, x.unsqueeze(-1), -row.sum(-1, keepdim=True))


def staggered_score(score: Tensor, dsigma: Tensor) -> Tensor:
    """Score carried back over a noise interval: scaled by exp(dsigma), the mask column absorbs the balance."""
    growth = expand(dsigma, score[..., 0]).exp()
    out = score * growth.unsqueeze(-1)
    out[..., -1] += (1 - growth) * score.sum(-1)
    return out


# ---------------------------------------------------------------------------------------------------- scores and loss


def to_log_score(raw: Tensor, x: Tensor, sigma: Tensor, scale_by_sigma: bool = True) -> Tensor:
    """Network output (..., V) to SEDD log scores: the noise level taken out, the current token's column set to 0."""
    if scale_by_sigma:
        raw = raw - expand(log_expm1(sigma), raw) - torch.log(torch.tensor(raw.shape[-1] - 1.0, dtype=raw.dtype))
    return raw.scatter(-1, x.unsqueeze(-1), 0)


def score_entropy(log_score: Tensor, x: Tensor, x0: Tensor, sigma: Tensor, mask_id: int) -> Tensor:
    """Denoising score entropy per token, (..., V) -> (...); 0 where x is not masked (SEDD eq. 5, absorbing graph).

    `log_score` may carry the mask column or not: only the N real columns are read.
    """
    inverse = 1 / torch.expm1(expand(sigma, x).to(log_score.dtype))
    real = log_score[..., :mask_id]
    at_x0 = real.gather(-1, x0.clamp(max=mask_id - 1).unsqueeze(-1)).squeeze(-1)
    entropy = real.exp().sum(-1) - inverse * at_x0 + inverse * (inverse.log() - 1)
    return torch.where(x == mask_id, entropy, 0)


# ----------------------------------------------------------------------------------------------------------- sampling


def euler_weights(score: Tensor, x: Tensor, t: Tensor, h: Tensor, noise: LogLinearNoise, mask_id: int) -> Tensor:
    """Weights (..., V) of one Euler step from t to t - h (each (B,)), from scores (..., V)."""
    step = expand(h * noise.rate(t), x).unsqueeze(-1)
    return one_hot(x, mask_id + 1, score.dtype) + step * reverse_rate(x, score, mask_id)


def analytic_weights(score: Tensor, x: Tensor, t: Tensor, h: Tensor, noise: LogLinearNoise, mask_id: int) -> Tensor:
    """Weights (..., V) of one analytic (Tweedie) step; the same map as Euler for this schedule, up to rounding."""
    dsigma = noise.sigma(t) - noise.sigma(t - h)
    return staggered_score(score, dsigma) * transposed_transition(x, dsigma, mask_id)


def denoise_weights(score: Tensor, x: Tensor, t: Tensor, noise: LogLinearNoise, mask_id: int) -> Tensor:
    """Weights (..., N) of the last step, which leaves no mask."""
    sigma = noise.sigma(t)
    return (staggered_score(score, sigma) * transposed_transition(x, sigma, mask_id))[..., :mask_id]


def race_sampler(
    score: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: int,
    noise: LogLinearNoise,
    mask_id: int,
    predictor: str,
    uniforms: Iterator[Tensor],
    end: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """SEDD's own sampler: one joint exponential race over all V columns a position and step.

    Args:
        score: (tokens (B, ...), sigma (B,)) -> scores (B, ..., V).
        x: tokens to start from (B, ...).
        predictor: `euler` or `analytic`.
        uniforms: one tensor (B, ..., V) a step, then one (B, ..., N) for the last, denoising one.

    Returns:
        the sampled tokens (B, ...), the states before every step and before the last one (steps + 1, B, ...), and the
        times (steps + 1,).
    """
    times = torch.linspace(1, end, steps + 1)
    h = torch.tensor((1 - end) / steps)
    trace = []
    weights = euler_weights if predictor == "euler" else analytic_weights
    for t in times[:-1]:
        trace.append(x)
        t = t.expand(x.shape[0])
        row = weights(score(x, noise.sigma(t)), x, t, h.expand_as(t), noise, mask_id)
        x = sample_categorical(row, next(uniforms))
    trace.append(x)
    t = times[-1].expand(x.shape[0])
    x = sample_categorical(denoise_weights(score(x, noise.sigma(t)), x, t, noise, mask_id), next(uniforms))
    return x, torch.stack(trace), times


# ------------------------------------------------------------------------------------------------------------ network

RELEASED_NAMES = (  # regex on a released key -> our name
    (r"vocab_embed\.embedding", "embedding.weight"),
    (r"sigma_map\.", "time."),
    (r"\.attn_qkv\.", ".qkv."),
    (r"\.attn_out\.", ".out."),
    (r"output_layer\.linear\.", "head."),
    (r"output_layer\.norm_final\.", "norm."),
)


class SEDDNetwork(nn.Module):
    """HiCoDiT's blocks put together as SEDD's transformer: tokens (B, L), noise levels (B,) -> log scores (B, L, V)."""

    def __init__(self, tokens: int, width: int, cond_dim: int, blocks: int, heads: int, scale_by_sigma: bool) -> None:
        super().__init__()
        self.scale_by_sigma = scale_by_sigma
        self.embedding = nn.Embedding(tokens + 1, width)
        self.time = TimeEmbedding(cond_dim)
        self.blocks = nn.ModuleList(AdaLNBlock(width, heads) for _ in range(blocks))
        self.norm = ScaleNorm(width)
        self.modulation = modulation_layer(cond_dim, width, blocks)
        self.head = nn.Linear(width, tokens + 1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        h = self.embedding(x)
        width = h.shape[-1]
        modulation = self.modulation(nn.functional.silu(self.time(sigma)))
        *parts, final = modulation.split([AdaLNBlock.PARTS * width] * len(self.blocks) + [2 * width], -1)
        rotary = rotary_table(x.shape[1], h.shape[-1] // self.blocks[0].heads, h.device)
        for block, part in zip(self.blocks, parts):
            h = block(h, part, rotary)
        out = self.head(self.norm(h, *final[:, None].chunk(2, -1)))
        return to_log_score(out, x, sigma, self.scale_by_sigma)

    def load_released(self, state: dict[str, Tensor]) -> None:
        """Load a state dict by the released program's key names, strictly; its modulation layers become one."""
        state = dict(state)
        renamed = {}
        owners = [*(f"blocks.{i}" for i in range(len(self.blocks))), "output_layer"]
        for end in ("weight", "bias"):
            parts = [torch.as_tensor(state.pop(f"{owner}.adaLN_modulation.{end}")) for owner in owners]
            renamed[f"modulation.{end}"] = torch.cat(parts)
        for key, value in state.items():
            for pattern, name in RELEASED_NAMES:
                key = re.sub(pattern, name, key)
            renamed[key] = torch.as_tensor(value)
        self.load_state_dict(renamed)
