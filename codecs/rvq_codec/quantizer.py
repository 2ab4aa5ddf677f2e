"""Factorised residual vector quantisation with normalised search (DAC, Kumar et al., 2023; van den Oord et al., 2017).

Axes: B batch, C latent channels, D code channels, K codes per codebook, Q levels, T frames. Codes are (B, Q, T) int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import UserError
from engine.nn.dac import WNConv1d


@dataclass(frozen=True)
class Quantized:
    """Output of the residual quantiser.

    Attributes:
        latent: (B, C, T), sum over the used levels.
        codes: (B, Q, T) int64.
        commitment, codebook: (Q,) weighted losses of each level, mean over channels, time and batch.
    """

    latent: Tensor
    codes: Tensor
    commitment: Tensor
    codebook: Tensor


class VectorQuantizer(nn.Module):
    """One level of quantisation: project C -> D, select the nearest codebook row, project D -> C.

    With D == C there are no projections.

    Args:
        channels: C.
        codes: K.
        dim: D.
        normalize: compare L2-normalised vectors. The looked-up row is not normalised.
    """

    def __init__(self, channels: int, codes: int, dim: int, normalize: bool = True):
        super().__init__()
        self.normalize = normalize
        self.projected = channels != dim
        self.in_project = WNConv1d(channels, dim, 1) if self.projected else nn.Identity()
        self.out_project = WNConv1d(dim, channels, 1) if self.projected else nn.Identity()
        self.codebook = nn.Embedding(codes, dim)

    def distances(self, e: Tensor) -> Tensor:
        """Return squared distances (B, T, K) of projected vectors (B, D, T) to all rows, in the expanded form of the
        released code.
        """
        e = e.transpose(1, 2)
        rows = self.codebook.weight
        if self.normalize:
            e = F.normalize(e, dim=-1)
            rows = F.normalize(rows, dim=-1)
        return e.square().sum(-1, keepdim=True) - 2 * (e @ rows.T) + rows.square().sum(-1)

    def embed(self, codes: Tensor) -> Tensor:
        """Look up codes (B, T) -> (B, C, T)."""
        return self.out_project(self.codebook(codes).transpose(1, 2))

    def forward(self, residual: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantise (B, C, T). Return quantised (B, C, T), codes (B, T), and squared errors (B,) for encoder and
        codebook.
        """
        e = self.in_project(residual)
        codes = (-self.distances(e.detach())).argmax(-1)
        rows = self.codebook(codes).transpose(1, 2)
        to_encoder = (e - rows.detach()).square().mean((1, 2))
        to_codebook = (rows - e.detach()).square().mean((1, 2))
        return self.out_project(e + (rows - e).detach()), codes, to_encoder, to_codebook


class ResidualQuantizer(nn.Module):
    """Residual quantiser of Q levels, each of which quantises the residual of the previous ones.

    Args:
        levels: Q.
        channels, codes, dim, normalize: see `VectorQuantizer`.
        dropout: fraction of a training batch that only uses the first n levels, with n uniform in 1..Q.
        commitment, codebook: weights of the losses.
    """

    def __init__(
        self,
        levels: int,
        channels: int,
        codes: int,
        dim: int,
        normalize: bool = True,
        dropout: float = 0.5,
        commitment: float = 0.25,
        codebook: float = 1.0,
    ):
        super().__init__()
        self.dropout = dropout
        self.commitment = commitment
        self.codebook = codebook
        self.quantizers = nn.ModuleList(VectorQuantizer(channels, codes, dim, normalize) for _ in range(levels))

    def forward(self, z: Tensor, levels: int | None = None) -> Quantized:
        """Quantise (B, C, T) with the first `levels` levels.

        In training mode all levels run and `levels` is ignored. For the first int(B * dropout) items, quantiser dropout
        masks all levels after a random one: they do not contribute to sum and losses, but their residual is still
        updated. Runs in float32 also under autocast, as half precision would change the nearest code of many frames.
        """
        count = len(self.quantizers) if self.training or levels is None else levels
        if not 1 <= count <= len(self.quantizers):
            raise UserError(f"levels={levels} must be from 1 to {len(self.quantizers)}")
        kept = self._levels_kept(z)
        residual = z.float()
        total = torch.zeros_like(z, dtype=torch.float32)
        codes = []
        commitment = []
        codebook = []
        with torch.autocast(z.device.type, enabled=False):
            for i, quantizer in enumerate(self.quantizers[:count]):
                q, index, to_encoder, to_codebook = quantizer(residual)
                use = (i < kept).float()
                total = total + q * use[:, None, None]
                residual = residual - q
                codes.append(index)
                commitment.append(self.commitment * (to_encoder * use).mean())
                codebook.append(self.codebook * (to_codebook * use).mean())
        return Quantized(total, torch.stack(codes, 1), torch.stack(commitment), torch.stack(codebook))

    def _levels_kept(self, batch: Tensor) -> Tensor:
        """Return the number of levels that each item of a batch uses, (B,)."""
        count = len(self.quantizers)
        size = batch.shape[0]
        kept = torch.full((size,), count, device=batch.device)
        dropped = int(size * self.dropout) if self.training else 0
        kept[:dropped] = torch.randint(1, count + 1, (dropped,), device=batch.device)
        return kept

    @torch.no_grad()
    def quantize(self, z: Tensor) -> Tensor:
        """Return codes (B, Q, T) of (B, C, T), as in evaluation mode."""
        training = self.training
        self.eval()
        try:
            return self(z).codes
        finally:
            self.train(training)

    def embed(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """Return the sum (B, C, T) of the projected vectors of the first `levels` levels of codes (B, Q, T).

        In training mode, quantiser dropout is applied.
        """
        count = codes.shape[1] if levels is None else levels
        if not 1 <= count <= min(codes.shape[1], len(self.quantizers)):
            raise UserError(
                f"levels={count}: the codes have {codes.shape[1]} levels and the quantiser {len(self.quantizers)}"
            )
        kept = self._levels_kept(codes)
        vectors = (self.quantizers[i].embed(codes[:, i]) * (i < kept)[:, None, None] for i in range(count))
        return sum(vectors)
