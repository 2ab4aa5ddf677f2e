"""The score network: branches, padding, temporal scales, ablations, initial state."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.errors import UserError
from hicodit.conditions import Conditions
from hicodit.conditions.encoders import TinyEncoderConfig
from hicodit.conditions.types import majority_expressions, num_expression_windows
from hicodit.layers import AdaLNBlock, rotary_table
from hicodit.model import BRANCHES, HiCoDiT, ModelConfig, positions_of, rows_of
from hicodit.system import HiCoDiTSystem

SMALL = {"codes": 16, "width": 32, "heads": 4, "low_blocks": 2, "high_blocks": 2, "cond_dim": 16, "lip_dim": 8}
ABLATIONS = [{}, {"hierarchical": False}, {"dual_scale": False}, {"normalised": False}, {"expression_context": True}]
TOKENS = torch.randint(0, 17, (3, 12, 40), generator=torch.Generator().manual_seed(2))
SIGMA = torch.linspace(0.5, 2, 3)


def build(**changes):
    torch.manual_seed(0)
    model = HiCoDiT(ModelConfig(**SMALL | {"face_dim": 8, "dropout": 0.0} | changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def clip_conditions(batch=3, frames=(20, 15, 20)):
    g = torch.Generator().manual_seed(1)
    lip = torch.randn(batch, 20, 8, generator=g)
    identity = torch.rand(batch, 256, generator=g)
    expression = torch.tensor([[1, 4], [2, 0], [5, 6]])[:batch]
    return Conditions(lip, identity, expression, torch.tensor(frames))


@torch.no_grad()
def run(model, conditions, tokens=TOKENS, where=None, sigma=SIGMA, **prepare):
    return model(tokens, sigma, model.prepare(conditions, **prepare), where)


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_batched_branches_equal_single_ones(changes):
    model = build(**changes)
    conditions = clip_conditions()
    together = run(model, conditions, branches=tuple(BRANCHES))
    assert together.shape == (5, 3, 12, 40, 16)
    for i, branch in enumerate(BRANCHES):
        alone = run(model, conditions, branches=(branch,))[0]
        assert torch.allclose(together[i], alone, atol=1e-5), branch


def test_logits_at_requested_positions_equal_those_of_the_whole_sequence():
    """Any number of them in each level, as in training, and as many in each level of each clip, as in sampling."""
    model = build()
    conditions = clip_conditions()
    mask = TOKENS == 16
    mask[:, 3] = False  # a level without any
    whole = run(model, conditions, branches=tuple(BRANCHES))
    branches = tuple(BRANCHES)
    where = positions_of(mask, mask.device)
    clip, level, frame = rows_of(where)
    assert torch.equal(torch.stack([clip, level, frame], 1).sort(0).values, mask.nonzero().sort(0).values)
    rows = run(model, conditions, where=where, branches=branches)
    assert torch.allclose(rows, whole[:, clip, level, frame], atol=1e-6)
    frames = torch.randint(0, 40, (3, 12, 7), generator=torch.Generator().manual_seed(3))
    clips = torch.arange(3)[:, None]
    rows = run(model, conditions, where=[(clips, frames[:, level]) for level in range(12)], branches=branches)
    expected = whole.gather(3, frames[None, ..., None].expand(5, -1, -1, -1, 16))
    assert torch.allclose(rows.unflatten(1, (12, 3, 7)).transpose(1, 2), expected, atol=1e-6)


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_padding_does_not_change_the_result(changes):
    model = build(**changes)
    conditions = clip_conditions()
    alone = Conditions(
        conditions.lip[1:2, :15], conditions.identity[1:2], conditions.expression[1:2], conditions.frames[1:2]
    )
    single = run(model, alone, TOKENS[1:2, :, :30], sigma=SIGMA[1:2])
    assert torch.allclose(run(model, conditions)[:, 1:2, :, :30], single, atol=1e-5)


@pytest.mark.parametrize("name", ["lip", "identity", "expression"])
def test_a_dropped_condition_has_no_influence(name):
    model = build()
    conditions = clip_conditions()
    keep = torch.tensor([[c != name for c in ("lip", "identity", "expression")]] * 3)
    value = getattr(conditions, name)
    changed = replace(conditions, **{name: (value + 1) % 7 if name == "expression" else value + 1.0})
    assert torch.equal(run(model, conditions, keep=keep), run(model, changed, keep=keep))
    assert not torch.equal(run(model, conditions), run(model, changed))


@torch.no_grad()
def test_the_first_temporal_scale_is_of_attention_and_the_second_of_the_mlp():
    """A scale of zero closes the input of one of them: its weights do not matter."""
    torch.manual_seed(0)
    block = AdaLNBlock(8, 2)
    h = torch.randn(2, 6, 8)
    modulation = torch.randn(2, 48)
    rotary = rotary_table(6, 4, h.device)
    for scales, layer in (((0.0, 1.0), block.qkv), ((1.0, 0.0), block.mlp[0])):
        temporal = torch.tensor(scales).expand(2, 6, 2)
        before = block(h, modulation, rotary, None, temporal)
        layer.weight.mul_(2)
        torch.testing.assert_close(block(h, modulation, rotary, None, temporal), before)


@pytest.mark.parametrize("changes", [{"dual_scale": False}, {"hierarchical": False}, {}], ids=str)
def test_ablations_take_expression_as_the_paper_says(changes):
    """Single scale: the mean of an utterance, in the global condition of all levels. Flat: all levels, two scales."""
    model = build(**changes)
    conditions = clip_conditions(frames=(25, 25, 25))
    conditions = replace(conditions, lip=F.pad(conditions.lip, (0, 0, 0, 5)))
    tokens = F.pad(TOKENS, (0, 10))
    swapped = run(model, replace(conditions, expression=conditions.expression.flip(1)), tokens)
    other = run(model, replace(conditions, expression=conditions.expression * 0), tokens)
    without_identity = run(model, replace(conditions, identity=conditions.identity * 0), tokens)
    before = run(model, conditions, tokens)

    def moves(new):  # levels 1-2, levels 3-12
        return tuple(
            not torch.allclose(a, b, atol=1e-5) for a, b in zip(new.split([2, 10], 2), before.split([2, 10], 2))
        )

    assert moves(swapped) == (not changes.get("hierarchical", True), changes.get("dual_scale", True))
    assert moves(other) == (bool(changes), True)
    assert moves(without_identity) == (True, True)


@pytest.mark.parametrize("changes", [{}, {"dual_scale": False}, {"hierarchical": False}], ids=str)
def test_the_expression_of_a_half_second_can_enter_each_stage(changes):
    """A new model is the one without it; then each stage's own input reaches that stage's levels."""
    without = build(**changes)
    model = HiCoDiT(replace(without.config, expression_context=True)).eval()
    model.load_state_dict(without.state_dict(), strict=False)
    conditions = clip_conditions()
    before = run(without, conditions)
    assert torch.equal(run(model, conditions), before)
    for i, stage in reversed(list(enumerate(model.stages))):
        nn.init.normal_(stage.fuse_expression.weight)
        now = run(model, conditions)
        moved = (now - before).abs().amax((0, 1, 3, 4)) > 1e-4  # (12,) levels
        assert moved.tolist() == [i == 0] * 2 + [True] * 10
        before = now
    other = replace(conditions, expression=conditions.expression.flip(1))
    dropped = torch.tensor([[True] * 3, [True, True, False], [True] * 3])
    first, second = (run(model, c, keep=dropped)[0, :, :2] for c in (conditions, other))
    assert (first - second).abs().amax((1, 2, 3)).gt(1e-4).tolist() == [True, False, True]


def test_the_residual_stream_stays_float32_under_autocast():
    model = build()
    dtypes = set()
    for block in [*model.stages[0].blocks, *model.stages[1].blocks]:
        block.register_forward_hook(lambda m, x, y: dtypes.update((x[0].dtype, y.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, clip_conditions())
    assert dtypes == {torch.float32} and out.dtype == torch.float32


def test_condition_dropout_rates():
    model = build(drop_all=0.2, drop_each=0.1)
    torch.manual_seed(0)
    keep = model.draw_keep(20_000, torch.device("cpu"))
    assert abs((~keep).all(1).float().mean().item() - 0.2 - 0.8 * 0.001) < 0.01
    assert abs(keep.all(1).float().mean().item() - 0.8 * 0.729) < 0.01


def test_expression_windows_vote_and_break_ties_by_probability():
    p = torch.full((25, 7), 0.01)
    p[:13, 1] = 0.9  # window 0 is frames 0..12, window 1 frames 13..24
    # six frames each: a tie that summed probability settles
    p[13:19, 2] = 0.5
    p[19:, 4] = 0.8
    assert majority_expressions(p).tolist() == [1, 4]
    for frames in range(1, 60):  # a last partial window counts: a clip of 13 frames has 26 tokens
        assert (
            len(majority_expressions(p[:1].expand(frames, -1)))
            == num_expression_windows(frames)
            == -(-2 * frames // 25)
        )
    assert majority_expressions(p[12:13].expand(13, -1)).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("changes", "encoders", "message"),
    [
        ({"drop_all": 0.8, "keep_single": 0.8}, {}, "sum must not exceed 1"),
        ({"identity_dim": 128}, {}, "set it to 256"),
        ({}, {"lip_heads": 64}, "multiple of 2 x encoders.lip_heads=64"),
    ],
)
def test_widths_and_probabilities_that_do_not_fit_are_refused(changes, encoders, message):
    sizes = {"lip_dim": 192, "face_dim": 128, "width": 32, "heads": 4}
    with pytest.raises(UserError, match=message):
        HiCoDiTSystem(ModelConfig(**sizes | changes), TinyEncoderConfig(**encoders))
