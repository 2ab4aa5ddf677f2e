"""The score network of HiCoDiT (arXiv 2604.15923): stages of AdaLN blocks over groups of RVQ levels, coarse to fine.

Axes: B batch, G guidance branches, K token levels, L token frames (50 a second), T video frames (25 a second),
J expression windows (2 a second), C width, E condition width, N real tokens (id N is the mask), M asked positions.

The paper's network is two stages. Low: levels 1-2; lip features joined by channel concatenation, identity and time
through AdaLN. High: levels 3-12; the low stage's output joined the same way, expression and time through dual-scale
AdaLN. The flat ablation is one stage of all levels that takes all conditions. Nothing here depends on diffusion time
except `forward`: `prepare` computes the rest once a clip, for all guidance branches.

What no source states was chosen here (inferred):
- a group of levels enters as the mean of its levels' embeddings (DEmoFace), one table of N + 1 rows a level;
- both fusions are a linear layer from 2C to C after concatenation, here as two layers that are added;
- lip features are repeated twice to reach 50 a second; a half-second window scales 25 tokens;
- heads of levels 1-2 read the low stage, the others the high stage, each after a modulated norm;
- gamma_t multiplies without a "1 +" and starts at 1; every other modulation starts at 0;
- a null condition is a learned vector, for expression a row of its table; positions are rotary;
- masks are drawn independently by level and frame, under one time a clip;
- heads give normalised log posteriors, and the AdaLN condition is 128 wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import UserError
from engine.nn.packing import Packing
from hicodit.conditions.types import NO_EXPRESSION, Conditions
from hicodit.layers import AdaLNBlock, AdaLNFinal, TimeEmbedding, rotary_table

CONDITIONS = ("lip", "identity", "expression")
GIVEN = {  # guidance branch -> conditions that it sees
    "none": (),
    "all": CONDITIONS,
    "lip": ("lip",),
    "identity": ("identity",),
    "expression": ("expression",),
}
TOKENS_PER_FRAME = 2
WINDOW_TOKENS = 25  # half a second of tokens share one temporal scale


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches. The defaults are `hicodit_base`; facts that no source states are marked (inferred).

    hierarchical: False is the flat ablation. dual_scale: False drops the temporal scale (single-scale AdaLN).
    normalised: heads give log posteriors; False gives free log scores, as SEDD's (inferred: True).
    cond_dim: width of the AdaLN condition (inferred: 128 as in SEDD).
    drop_all, drop_each: training probability of dropping all conditions, else each by itself.
    keep_single: training probability of keeping exactly one condition (not in the paper: 0).
    packed: training leaves the padding of a batch out of all blocks; losses are the same.
    """

    levels: int = 12
    low_levels: int = 2
    codes: int = 1024
    width: int = 768
    heads: int = 12
    low_blocks: int = 8
    high_blocks: int = 8
    cond_dim: int = 128
    lip_dim: int = 1024
    identity_dim: int = 256
    face_dim: int = 512
    expressions: int = 7
    dropout: float = 0.1
    hierarchical: bool = True
    dual_scale: bool = True
    normalised: bool = True
    drop_all: float = 0.1
    drop_each: float = 0.1
    keep_single: float = 0.0
    attention: str = "sdpa"
    packed: bool = False


@dataclass(frozen=True)
class StageInputs:
    """What a stage needs that does not depend on diffusion time, for its U distinct guidance branches."""

    lip: Tensor | None  # (U * B, L, C) lip features through their half of the fusion layer
    cond: Tensor  # (U * B, E) embedded identity and pooled expression
    temporal: Tensor | None  # (blocks, U * B, L, 2)
    parent: Tensor | None  # (U * B,) rows of the previous stage's output


@dataclass(frozen=True)
class Prepared:
    """All time-independent work for a batch of clips and a set of guidance branches."""

    stages: tuple[StageInputs, ...]
    rows: tuple[Tensor, ...]  # per stage (G * B,): which of its rows serves each branch and clip
    rotary: Tensor  # (2, L, D/2)
    mask: Tensor | Packing | None  # (B, 1, 1, L), True at real frames; None when there is no padding
    branches: int


class Stage(nn.Module):
    """Blocks over one group of levels: mean of the levels' embeddings, fused with a companion sequence."""

    def __init__(self, config: ModelConfig, first: int, last: int, blocks: int, takes: Sequence[str]) -> None:
        super().__init__()
        c = config
        self.first, self.last, self.takes = first, last, tuple(takes)
        self.embeddings = nn.ModuleList(nn.Embedding(c.codes + 1, c.width) for _ in range(first, last))
        self.fuse_tokens = nn.Linear(c.width, c.width)
        self.fuse_companion = nn.Linear(c.width, c.width, bias=False)  # the concatenation's second half
        self.blocks = nn.ModuleList(
            AdaLNBlock(c.width, c.heads, c.cond_dim, dropout=c.dropout, attention=c.attention) for _ in range(blocks)
        )
        self.temporal = None
        if "expression" in takes and c.dual_scale:
            self.temporal = nn.Sequential(
                nn.Linear(c.cond_dim, c.cond_dim), nn.SiLU(), nn.Linear(c.cond_dim, 2 * blocks)
            )
            nn.init.zeros_(self.temporal[-1].weight)  # gamma_t multiplies without a "1 +": it has to start at 1
            nn.init.ones_(self.temporal[-1].bias)
        self.final = AdaLNFinal(c.width, c.cond_dim)
        self.heads = nn.ModuleList(nn.Linear(c.width, c.codes) for _ in range(first, last))
        for table in self.embeddings:
            nn.init.normal_(table.weight, std=0.02 * (last - first) ** 0.5)
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, tokens: Tensor, companion: Tensor, cond: Tensor, shared: Prepared, inputs: StageInputs) -> Tensor:
        """tokens (B, K, L), companion (U * B, L, C), cond (U * B, E) -> hidden (U * B, L, C)."""
        copies = len(cond) // len(tokens)
        embedded = torch.stack([table(tokens[:, self.first + i]) for i, table in enumerate(self.embeddings)]).mean(0)
        if isinstance(shared.mask, Packing):
            return self._packed(embedded, companion, cond, shared.rotary, shared.mask, inputs.temporal)
        h = self.fuse_tokens(embedded).repeat(copies, 1, 1) + companion
        mask = shared.mask.repeat(copies, 1, 1, 1) if shared.mask is not None else None
        for i, block in enumerate(self.blocks):
            h = block(h, cond, shared.rotary, mask, inputs.temporal[i] if inputs.temporal is not None else None)
        return h

    def _packed(
        self,
        embedded: Tensor,
        companion: Tensor,
        cond: Tensor,
        rotary: Tensor,
        packing: Packing,
        temporal: Tensor | None,
    ) -> Tensor:
        h = self.fuse_tokens(packing.pack(embedded)) + packing.pack(companion)
        for i, block in enumerate(self.blocks):
            h = block(h, cond, rotary, packing, packing.pack(temporal[i]) if temporal is not None else None)
        return packing.unpack(h)


class HiCoDiT(nn.Module):
    """Tokens, noise level and conditions to log posteriors over clean tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = c = config
        if (
            c.heads < 1
            or c.width % (2 * c.heads)
            or not 0 < c.low_levels < c.levels
            or c.attention not in ("sdpa", "flash")
        ):
            raise UserError(
                f"model: width={c.width} must be a multiple of 2 x heads={c.heads}, low_levels={c.low_levels} lie "
                f"between 0 and levels={c.levels}, and attention={c.attention!r} be sdpa or flash"
            )
        self.time = TimeEmbedding(c.cond_dim)
        self.lip_proj = nn.Sequential(nn.Linear(c.lip_dim, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.identity_proj = nn.Sequential(
            nn.Linear(c.identity_dim, c.cond_dim), nn.SiLU(), nn.Linear(c.cond_dim, c.cond_dim)
        )
        self.expression_table = nn.Embedding(c.expressions + 1, c.cond_dim)  # last row: no expression
        self.expression_proj = nn.Sequential(
            nn.Linear(c.cond_dim, c.cond_dim), nn.SiLU(), nn.Linear(c.cond_dim, c.cond_dim)
        )
        self.null_lip = nn.Parameter(torch.zeros(c.lip_dim))
        self.null_identity = nn.Parameter(torch.zeros(c.identity_dim))
        self.identity_adapter = nn.Sequential(
            nn.Linear(c.face_dim, c.identity_dim), nn.SiLU(), nn.Linear(c.identity_dim, c.identity_dim), nn.ReLU()
        )
        if c.hierarchical:
            plan = [
                (0, c.low_levels, c.low_blocks, CONDITIONS[:2]),
                (c.low_levels, c.levels, c.high_blocks, CONDITIONS[2:]),
            ]
        else:
            plan = [(0, c.levels, c.low_blocks + c.high_blocks, CONDITIONS)]
        self.stages = nn.ModuleList(Stage(c, *stage) for stage in plan)

    @property
    def mask_id(self) -> int:
        return self.config.codes

    def adapt_identity(self, face: Tensor) -> Tensor:
        """Face embedding (B, face_dim) to a unit vector (B, 256) of the GE2E voice space, whose values are >= 0."""
        return F.normalize(self.identity_adapter(face), dim=-1, eps=1e-6)

    def draw_keep(self, batch: int, device: torch.device) -> Tensor:
        """Training dropout of conditions: (1, B, 3) bool, True where lip, identity, expression is kept."""
        c = self.config
        keep = torch.rand(batch, 3, device=device) >= c.drop_each
        single = F.one_hot(torch.randint(3, (batch,), device=device), 3).bool()
        u = torch.rand(batch, 1, device=device)
        keep = torch.where(u < c.drop_all + c.keep_single, single, keep)
        return torch.where(u < c.drop_all, False, keep)[None]

    def prepare(
        self, conditions: Conditions, branches: Sequence[str] = ("all",), keep: Tensor | None = None
    ) -> Prepared:
        """Do all work that does not depend on diffusion time.

        A stage computes each distinct combination of the conditions that can reach it only once: in the hierarchical
        network the `expression` branch shares the low stage's rows with `none`.

        Args:
            branches: guidance branches, names of `GIVEN`.
            keep: (1, B, 3) bool instead of branches, a pattern of kept conditions for each clip (training).
        """
        batch, device = conditions.batch, conditions.lip.device
        length = TOKENS_PER_FRAME * conditions.lip.shape[1]
        training = keep is not None
        if keep is None:
            patterns = [[name in GIVEN[branch] for name in CONDITIONS] for branch in branches]
            keep = torch.tensor(patterns, device=device)[:, None].expand(-1, batch, -1)
        else:
            assert len(keep) == 1, "patterns of clips are for one branch: rows are merged by their first clip's pattern"
        named = [tuple(row) for row in keep[:, 0].tolist()]
        count = len(keep)
        lip, identity, expression = self._embed(conditions, length)
        valid = torch.arange(length, device=device) < TOKENS_PER_FRAME * conditions.frames[:, None]  # (B, L)

        stages, rows, reach, previous = [], [], set(), None
        for stage in self.stages:
            reach |= {CONDITIONS.index(name) for name in stage.takes}
            distinct: dict[tuple, int] = {}  # pattern of the conditions that reach this stage -> its place
            place = [distinct.setdefault(tuple(row[i] for i in sorted(reach)), len(distinct)) for row in named]
            chosen = [place.index(u) for u in range(len(distinct))]  # one branch for each distinct pattern
            kept = keep[chosen].unbind(-1)  # three of (U, B)
            stages.append(self._stage_inputs(stage, lip, identity, expression, valid, kept, previous, chosen))
            index = torch.tensor(place, device=device)[:, None] * batch + torch.arange(batch, device=device)
            rows.append(index.flatten())
            previous = index
        rotary = rotary_table(length, self.config.width // self.config.heads, device)
        mask: Tensor | Packing | None = None if bool(valid.all()) else valid[:, None, None]
        if self.config.packed and training and mask is not None:
            mask = Packing.of(valid)
            rotary = rotary[:, mask.position]
        return Prepared(tuple(stages), tuple(rows), rotary, mask, count)

    def _embed(self, conditions: Conditions, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Given (row 0) and null (row 1) of each: lip (2, B, L, C), identity (2, B, E), expression (2, B, L, E)."""
        null_lip = self.null_lip.expand_as(conditions.lip)
        lip = self.lip_proj(torch.stack([conditions.lip.to(null_lip.dtype), null_lip]))
        lip = lip.repeat_interleave(TOKENS_PER_FRAME, 2)
        identity = torch.stack([conditions.identity, self.null_identity.expand_as(conditions.identity)])
        window = (torch.arange(length, device=lip.device) // WINDOW_TOKENS).clamp(
            max=conditions.expression.shape[1] - 1
        )
        classes = conditions.expression[:, window]
        expression = self.expression_table(torch.stack([classes, torch.full_like(classes, NO_EXPRESSION)]))
        return lip, self.identity_proj(identity), expression

    def _stage_inputs(self, stage, lip, identity, expression, valid, kept, previous, chosen) -> StageInputs:
        """Pick given or null for every (U, B) of a stage, and do its time-independent layers."""
        batch = lip.shape[1]
        clips = torch.arange(batch, device=lip.device)
        pick = {name: (~k).long() for name, k in zip(CONDITIONS, kept)}  # (U, B): 0 given, 1 null
        cond, temporal, companion, parent = 0.0, None, None, None
        if "lip" in stage.takes:
            companion = stage.fuse_companion(lip)[pick["lip"], clips].flatten(0, 1)
        if "identity" in stage.takes:
            cond = cond + identity[pick["identity"], clips].flatten(0, 1)
        if "expression" in stage.takes:
            sequence = expression[pick["expression"], clips].flatten(0, 1)  # (U * B, L, E)
            weight = (valid / valid.sum(1, keepdim=True)).repeat(len(chosen), 1)  # padding takes no part in the pool
            cond = cond + self.expression_proj(torch.einsum("ule,ul->ue", sequence, weight))
            if stage.temporal is not None:
                scales = stage.temporal(sequence).unflatten(-1, (len(stage.blocks), 2))
                temporal = scales.permute(2, 0, 1, 3)
        if previous is not None:
            parent = previous[chosen].flatten()
        return StageInputs(companion, cond, temporal, parent)

    def forward(self, tokens: Tensor, sigma: Tensor, prepared: Prepared) -> list[tuple[Tensor, Tensor]]:
        """tokens (B, K, L) and sigma (B,) to each stage's hidden (U * B, L, C) and AdaLN condition (U * B, E)."""
        time, hidden = self.time(sigma), []
        for stage, inputs in zip(self.stages, prepared.stages):
            cond = F.silu(inputs.cond + time.repeat(len(inputs.cond) // len(tokens), 1))
            companion = inputs.lip if inputs.lip is not None else stage.fuse_companion(hidden[-1][0])[inputs.parent]
            h = stage(tokens, companion, cond, prepared, inputs)
            hidden.append((h, cond))
        return hidden

    def log_posterior(self, hidden: list[tuple[Tensor, Tensor]], prepared: Prepared, where: Tensor) -> Tensor:
        """Log posteriors (G, M, N) at the positions `where` (B, K, L), rows in the order of `where.nonzero()`.

        Only the asked positions pass the heads. With `normalised` off the rows are log unnormalised posteriors.
        """
        batch = len(where)
        clip, level, frame = where.nonzero(as_tuple=True)
        parts, order = [], []
        for stage, (h, cond), rows in zip(self.stages, hidden, prepared.rows):
            rows = rows.view(prepared.branches, batch)
            for i, head in enumerate(stage.heads):
                at = (level == stage.first + i).nonzero()[:, 0]
                row = rows[:, clip[at]]  # (G, m)
                parts.append(head(stage.final(h[row, frame[at]], cond, row)).float())
                order.append(at)
        # Put in order once: filling a tensor level by level would copy its whole gradient for every level.
        out = torch.cat(parts, 1)[:, torch.cat(order).argsort()]
        if self.config.normalised:
            return out.log_softmax(-1)
        return out - torch.log(torch.tensor(float(self.config.codes)))
