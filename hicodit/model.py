"""The score network of HiCoDiT (arXiv 2604.15923): stages of AdaLN blocks over groups of RVQ levels, coarse to fine.

Axes: B clips, G guidance branches, U distinct branches of the low stage, R rows of a stage (branches times B), K token
levels, L token frames (50 per second), T video frames (25 per second), J expression windows (2 per second), C width, E
condition width, N codes (id N is the mask), M requested positions, n blocks of a stage.

The low stage models levels 1-2; lip features enter by channel concatenation, identity and time by AdaLN. The high stage
models levels 3-12; the output of the low stage enters by concatenation, expression and time by dual-scale AdaLN.
`expression_context` (not in the paper; the bundled model has it) adds the expression to both inputs. There are two
ablations: *flat* is a single stage of all levels with all conditions; *single scale* has plain AdaLN, where the
expression of the whole utterance, identity and time form a global condition of all blocks.

Design choices that the paper does not specify:
- the input of a group of levels is the mean of their embeddings (DEmoFace), with a table of N + 1 rows per level;
- both concatenations are followed by a linear layer from 2C to C, implemented as the sum of two layers;
- lip features are repeated twice to reach 50 per second;
- the heads of levels 1-2 are attached to the low stage, the others to the high stage, each after a modulated norm;
- null conditions are learned vectors, for expression a row of its table; position embeddings are rotary;
- the heads output normalised log posteriors, and the AdaLN condition has 128 channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.device import to_device
from engine.errors import UserError
from engine.settings import Group, setting
from hicodit.conditions.types import Conditions
from hicodit.layers import AdaLNBlock, ScaleNorm, TemporalScales, TimeEmbedding, modulation_layer, rotary_table

CONDITIONS = ("lip", "identity", "expression")
BRANCHES = {  # conditions of each guidance branch
    "none": (),
    "all": CONDITIONS,
    "identity": ("identity",),
    "expression": ("expression",),
    "lip": ("lip",),
}
FLOAT32_MODULES = (  # parts whose weights stay in float32 at any precision
    "time", "modulation", "temporal", "identity_proj", "expression_proj", "identity_adapter"
)  # fmt: skip
TOKENS_PER_FRAME = 2
WINDOW_TOKENS = 25  # half a second of tokens share one temporal scale


@dataclass(frozen=True)
class ModelConfig(Group, prefix="model."):
    """Config of `HiCoDiT`. The defaults are `hicodit_base`.

    Attributes:
        expressions: number of expression classes, embedded with width C.
        hierarchical: False for the flat ablation.
        dual_scale: False for the single-scale ablation.
        expression_context: add the linearly projected expression of each half second to the input of each stage (not in
            the paper, whose temporal scale only changes a magnitude).
        normalised: True for log posteriors, False for unnormalised log scores as in SEDD.
        drop_all, drop_each: training probability of dropping all conditions, and otherwise each condition
            independently.
        keep_single: training probability of keeping exactly one condition (not in the paper: 0).
        attention: sdpa, or flash for the flash-attn kernel where possible.
    """

    levels: int = setting(12, 1, 256)
    low_levels: int = setting(2, 1, 256)
    codes: int = setting(1024, 1, 2**16)
    width: int = setting(768, 1, 2**14)
    heads: int = setting(12, 1, 256)
    low_blocks: int = setting(8, 1, 256)
    high_blocks: int = setting(8, 1, 256)
    cond_dim: int = setting(128, 1, 2**16)
    lip_dim: int = setting(1024, 1, 2**16)
    identity_dim: int = setting(256, 1, 2**16)
    face_dim: int = setting(512, 1, 2**16)
    expressions: int = setting(7, 1, 1024)
    dropout: float = setting(0.1, 0.0, 1.0)
    hierarchical: bool = True
    dual_scale: bool = True
    expression_context: bool = False
    normalised: bool = True
    drop_all: float = setting(0.1, 0.0, 1.0)
    drop_each: float = setting(0.1, 0.0, 1.0)
    keep_single: float = setting(0.0, 0.0, 1.0)
    attention: str = setting("sdpa", choices=("sdpa", "flash"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % (2 * self.heads):
            raise UserError(f"model.width={self.width} must be a multiple of 2 x model.heads={self.heads}")
        if self.low_levels >= self.levels:
            raise UserError(f"model.low_levels={self.low_levels} must be less than model.levels={self.levels}")
        if self.drop_all + self.keep_single > 1:
            raise UserError(
                f"model.drop_all={self.drop_all} and model.keep_single={self.keep_single} are probabilities of "
                "different cases: their sum must not exceed 1"
            )


@dataclass(frozen=True)
class Conditioning:
    """Time-independent tensors for B clips and G guidance branches.

    Rows are ordered by branch, then by clip. Branches that are identical for the low stage share its rows.

    Attributes:
        low_context: (U * B, L, C) added to the tokens of the low stage: lip features and, with `expression_context`,
            expression.
        high_context: (G * B, L, C) expression, added to the input of the high stage. None without
            `expression_context`.
        global_conds: (R, E) condition of each stage: embedded identity and pooled expression.
        window_expressions: (G * B, J, E) embedded expression of each half second, for the temporal scales. None
            without dual-scale AdaLN.
        low_index: (G * B,) row of the low stage for each row. None if all differ.
        rotary: (2, L, D/2) rotary position embeddings.
        mask: (B, 1, 1, L) bool, True at real token frames; None if no clip is padded.
    """

    low_context: Tensor
    high_context: Tensor | None
    global_conds: tuple[Tensor, ...]
    window_expressions: Tensor | None
    low_index: Tensor | None
    rotary: Tensor
    mask: Tensor | None


def positions_of(mask: Tensor, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return clip and frame indices (n,) of the True positions of a mask (B, K, L) for each level, on the device.

    The mask is on the host, as counting positions on the device would synchronise.
    """
    level, clip, frame = mask.transpose(0, 1).nonzero(as_tuple=True)
    counts = level.bincount(minlength=mask.shape[1]).tolist()
    clips, frames = to_device(torch.stack([clip, frame]), device)
    return list(zip(clips.split(counts), frames.split(counts)))


def rows_of(where: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return clip, level and frame (M,) of the rows that `HiCoDiT.forward` computes for these positions."""
    clip = torch.cat([clips for clips, _ in where])
    frame = torch.cat([frames for _, frames in where])
    level = torch.cat([torch.full_like(clips, level) for level, (clips, _) in enumerate(where)])
    return clip, level, frame


def padding(frames: Tensor, length: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Return the padding mask for attention and the weights for expression pooling.

    Args:
        frames: (B,) video frames of each clip, on the host.
        length: L, token frames of the padded batch.

    Returns:
        mask: (B, 1, 1, L) bool, True at real token frames; None if no clip is padded.
        window_fraction: (B, J) fraction of the token frames of a clip in each half second, 0 for padding.
    """
    ends = TOKENS_PER_FRAME * frames[:, None]  # (B, 1)
    valid = torch.arange(length, device=frames.device) < ends
    mask = None if bool(valid.all()) else to_device(valid, device)[:, None, None]
    starts = WINDOW_TOKENS * torch.arange(-(-length // WINDOW_TOKENS), device=frames.device)  # (J,)
    fraction = (ends - starts).clamp(0, WINDOW_TOKENS) / ends
    return mask, to_device(fraction, device)


class Stage(nn.Module):
    """Blocks over one group of levels. The input is the mean of the level embeddings, fused with a context sequence."""

    def __init__(self, config: ModelConfig, first: int, last: int, blocks: int, conditions: Sequence[str]) -> None:
        super().__init__()
        c = config
        self.first = first
        self.conditions = tuple(conditions)
        self.inputs = (*conditions, "expression") if c.expression_context else self.conditions
        self.embeddings = nn.ModuleList(nn.Embedding(c.codes + 1, c.width) for _ in range(first, last))
        self.fuse_tokens = nn.Linear(c.width, c.width)
        self.fuse_context = nn.Linear(c.width, c.width, bias=False)  # second half of the concatenation
        self.fuse_expression = nn.Linear(c.width, c.width, bias=False) if c.expression_context else None
        if c.expression_context:
            nn.init.zeros_(self.fuse_expression.weight)  # zero-initialised, so that training starts without this input
        self.blocks = nn.ModuleList(
            AdaLNBlock(c.width, c.heads, dropout=c.dropout, attention=c.attention) for _ in range(blocks)
        )
        two_scales = c.dual_scale and "expression" in conditions
        self.temporal = TemporalScales(c.width, c.cond_dim, blocks) if two_scales else None
        self.norm = ScaleNorm(c.width)  # norm before the heads
        self.modulation = modulation_layer(c.cond_dim, c.width, blocks)
        self.heads = nn.ModuleList(nn.Linear(c.width, c.codes) for _ in range(first, last))
        for table in self.embeddings:
            nn.init.normal_(table.weight, std=0.02 * (last - first) ** 0.5)
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def conditions_in(self, branch: str) -> tuple[bool, ...]:
        """Return which of `CONDITIONS` this stage receives in a guidance branch."""
        return tuple(name in BRANCHES[branch] and name in self.inputs for name in CONDITIONS)

    def expression_context(self, embedded: Tensor, length: int) -> Tensor | None:
        """Project embedded expressions (R, J, C) to an input (R, L, C) for `length` token frames.

        Return None if the model has no `expression_context`.
        """
        if self.fuse_expression is None:
            return None
        return self.fuse_expression(embedded).repeat_interleave(WINDOW_TOKENS, 1)[:, :length]

    def forward(
        self, tokens: Tensor, context: Tensor, time: Tensor, cond: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """Map tokens (B, K, L), context (R, L, C), time (B, E), cond (R, E) to hidden states and head inputs, each (R,
        L, C).
        """
        copies = len(context) // len(tokens)  # guidance branches
        tables = enumerate(self.embeddings, self.first)
        embedded = torch.stack([table(tokens[:, level]) for level, table in tables]).mean(0)
        # The residual stream stays in float32, also under autocast.
        h = (self.fuse_tokens(embedded).repeat(copies, 1, 1) + context).float()
        mask = conditioning.mask
        if mask is not None:
            mask = mask.repeat(copies, 1, 1, 1)
        temporal = None
        with torch.autocast(h.device.type, enabled=False):  # modulation stays in float32
            time = time.repeat(copies, 1)
            modulation = self.modulation(F.silu(cond + time))
            if self.temporal is not None:
                window = torch.arange(tokens.shape[-1], device=h.device) // WINDOW_TOKENS
                temporal = self.temporal(conditioning.window_expressions, time)[:, window]  # (R, L, 2n)
        *parts, final = modulation.split([AdaLNBlock.PARTS * h.shape[-1]] * len(self.blocks) + [2 * h.shape[-1]], -1)
        for i, (block, part) in enumerate(zip(self.blocks, parts)):
            scales = temporal[..., 2 * i : 2 * i + 2] if temporal is not None else None
            h = block(h, part, conditioning.rotary, mask, scales)
        return h, self.norm(h, *final[:, None].chunk(2, -1))


class HiCoDiT(nn.Module):
    """Maps tokens, noise level and conditions to log posteriors over clean tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = c = config
        self.time = TimeEmbedding(c.cond_dim)
        self.lip_proj = _mlp(c.lip_dim, c.width)
        self.identity_proj = _mlp(c.identity_dim, c.cond_dim)
        self.expression_table = nn.Embedding(c.expressions + 1, c.width)  # last row: no expression
        self.expression_proj = _mlp(c.width, c.cond_dim)
        self.null_lip = nn.Parameter(torch.zeros(c.lip_dim))
        self.null_identity = nn.Parameter(torch.zeros(c.identity_dim))
        self.identity_adapter = nn.Sequential(*_mlp(c.face_dim, c.identity_dim), nn.ReLU())
        if not c.hierarchical:
            plan = [(0, c.levels, c.low_blocks + c.high_blocks, CONDITIONS)]
        else:
            low = ("lip", "identity") if c.dual_scale else CONDITIONS
            high = ("expression",) if c.dual_scale else CONDITIONS[1:]
            plan = [(0, c.low_levels, c.low_blocks, low), (c.low_levels, c.levels, c.high_blocks, high)]
        self.stages = nn.ModuleList(Stage(c, *stage) for stage in plan)

    @property
    def mask_id(self) -> int:
        """Id of masked tokens."""
        return self.config.codes

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrices; see `engine.precision`."""
        return self.stages[0].fuse_tokens.weight.dtype

    def adapt_identity(self, face: Tensor) -> Tensor:
        """Map a face embedding (B, face_dim) to a unit vector (B, 256) in the GE2E space, whose values are
        non-negative.
        """
        return F.normalize(self.identity_adapter(face), dim=-1, eps=1e-6)

    def draw_keep(self, batch: int, device: torch.device) -> Tensor:
        """Draw the training dropout of conditions: (B, 3) bool, True where lip, identity, expression is kept."""
        c = self.config
        keep = torch.rand(batch, 3, device=device) >= c.drop_each
        single = F.one_hot(torch.randint(3, (batch,), device=device), 3).bool()
        u = torch.rand(batch, 1, device=device)
        keep = torch.where(u < c.drop_all + c.keep_single, single, keep)
        return torch.where(u < c.drop_all, False, keep)

    def prepare(
        self,
        conditions: Conditions,
        branches: Sequence[str] = ("all",),
        keep: Tensor | None = None,
    ) -> Conditioning:
        """Compute all tensors that do not depend on the diffusion time.

        Args:
            conditions: conditions of B clips.
            branches: guidance branches, keys of `BRANCHES`.
            keep: (B, 3) bool, the conditions that each clip keeps, instead of branches (training).
        """
        device = conditions.lip.device
        batch = len(conditions.frames)
        length = TOKENS_PER_FRAME * conditions.lip.shape[1]
        mask, window_fraction = padding(conditions.frames, length, device)
        if keep is None:
            high = self.guidance_rows(branches, device)
            low, low_index = self.low_rows(branches, batch, device)
        else:
            low = high = keep[None]  # (1, B, 3)
            low_index = None
        lip = self.lip_proj(torch.where(low[..., 0, None, None], conditions.lip, self.null_lip).flatten(0, 1))
        lip_context = self.stages[0].fuse_context(lip).repeat_interleave(TOKENS_PER_FRAME, 1)
        global_conds = []
        expression_contexts = []  # by stage
        window_expressions = None
        for stage, kept in zip(self.stages, (low, high)):
            expression = self.embed_expression(conditions, kept) if "expression" in stage.inputs else None
            global_conds.append(self.global_cond(stage, conditions, kept, expression, window_fraction))
            expression_contexts.append(None if expression is None else stage.expression_context(expression, length))
            if stage.temporal is not None:
                window_expressions = stage.temporal.expression(expression)
        low_expression, *high_expression = expression_contexts
        return Conditioning(
            low_context=lip_context if low_expression is None else lip_context + low_expression,
            high_context=high_expression[0] if high_expression else None,  # the flat ablation has no high stage
            global_conds=tuple(global_conds),
            window_expressions=window_expressions,
            low_index=low_index,
            rotary=rotary_table(length, self.config.width // self.config.heads, device),
            mask=mask,
        )

    def embed_expression(self, conditions: Conditions, kept: Tensor) -> Tensor:
        """Embed the expression of each half second, (R, J, C).

        Args:
            conditions: conditions of B clips.
            kept: (R / B, 1 or B, 3) bool, the conditions that each row of a stage keeps.
        """
        classes = torch.where(kept[..., 2, None], conditions.expression, self.config.expressions)
        return self.expression_table(classes).flatten(0, 1)

    def global_cond(
        self, stage: Stage, conditions: Conditions, kept: Tensor, expression: Tensor | None, window_fraction: Tensor
    ) -> Tensor:
        """Return the global condition (R, E) of a stage, without time.

        Args:
            stage: the stage, which has the identity, the pooled expression, or both as global conditions.
            conditions: conditions of B clips.
            kept: see `embed_expression`.
            expression: result of `embed_expression`. None if the stage has no expression input.
            window_fraction: (B, J), see `padding`.
        """
        terms = []
        if "identity" in stage.conditions:
            identity = torch.where(kept[..., 1, None], conditions.identity, self.null_identity)
            terms.append(self.identity_proj(identity.flatten(0, 1)))
        if "expression" in stage.conditions:
            pooled = torch.einsum("rjc,rj->rc", expression, window_fraction.repeat(len(kept), 1))
            terms.append(self.expression_proj(pooled))
        return sum(terms)

    def guidance_rows(self, branches: Sequence[str], device: torch.device) -> Tensor:
        """Return the conditions of the high stage in each guidance branch, (G, 1, 3) bool."""
        rows = [self.stages[-1].conditions_in(branch) for branch in branches]
        return to_device(torch.tensor(rows)[:, None], device)

    def low_rows(self, branches: Sequence[str], batch: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return the distinct rows that the low stage computes; branches that are identical for it share their rows.

        Returns:
            rows: (U, 1, 3) bool, conditions of the low stage in each of its distinct branches.
            low_index: (G * B,) row among U * B for each clip and branch. None if all branches differ.
        """
        seen = [self.stages[0].conditions_in(branch) for branch in branches]
        distinct = list(dict.fromkeys(seen))
        rows = to_device(torch.tensor(distinct)[:, None], device)
        if len(distinct) == len(seen):
            return rows, None
        first = torch.tensor([batch * distinct.index(row) for row in seen])  # (G,) first row of each branch
        index = (first[:, None] + torch.arange(batch)).flatten()
        return rows, to_device(index, device)

    def forward(
        self,
        tokens: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        where: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Compute log posteriors of the clean tokens in float32, without synchronising with the host.

        Args:
            tokens: (B, K, L).
            sigma: noise level (B,).
            where: clip and frame indices of the requested positions of each level, two tensors that broadcast to each
                other. None: all positions.

        Returns:
            (G, B, K, L, N); with `where` (G, M, N), one row per position, level by level. Without `normalised`, logs of
            unnormalised posteriors.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            time = self.time(sigma)
        low = self.stages[0]
        h, out = low(tokens, conditioning.low_context, time, conditioning.global_conds[0], conditioning)
        if conditioning.low_index is not None:
            h = h[conditioning.low_index]
            out = out[conditioning.low_index]
        outs = [out] * len(low.heads)
        for high in self.stages[1:]:
            context = high.fuse_context(h)
            if conditioning.high_context is not None:
                context = context + conditioning.high_context
            _, out = high(tokens, context, time, conditioning.global_conds[1], conditioning)
            outs += [out] * len(high.heads)
        heads = [head for stage in self.stages for head in stage.heads]
        outs = [out.unflatten(0, (-1, len(tokens))) for out in outs]  # (G, B, L, C) for each level
        if where is None:
            logits = torch.stack([head(out) for head, out in zip(heads, outs)], 2)
        else:
            rows = (head(out[:, clip, frame]) for head, out, (clip, frame) in zip(heads, outs, where))
            logits = torch.cat([row.flatten(1, -2) for row in rows], 1)
        logits = logits.float()
        return logits.log_softmax(-1) if self.config.normalised else logits - math.log(self.config.codes)


def _mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))
