"""The score network: branches, padding, ablations, initial state."""

import pytest
import torch
from torch import nn

from hicodit.conditions import Conditions
from hicodit.conditions.types import window_expressions
from hicodit.diffusion import LogLinearNoise, weighted_score_entropy
from hicodit.guidance import BRANCHES
from hicodit.model import HiCoDiT, ModelConfig

SMALL = {"codes": 16, "width": 32, "heads": 4, "low_blocks": 2, "high_blocks": 2, "cond_dim": 16, "lip_dim": 8}
ABLATIONS = [{}, {"hierarchical": False}, {"dual_scale": False}, {"normalised": False}]


def build(**changes):
    torch.manual_seed(0)
    model = HiCoDiT(ModelConfig(**SMALL, face_dim=8, dropout=0.0, **changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def clip_conditions(batch=3, frames=(20, 15, 20)):
    g = torch.Generator().manual_seed(1)
    lip, identity = torch.randn(batch, 20, 8, generator=g), torch.rand(batch, 256, generator=g)
    expression = torch.randint(0, 7, (batch, 2), generator=g)
    return Conditions(lip, identity, expression, torch.tensor(frames))


def run(model, conditions, tokens, where, **prepare):
    prepared = model.prepare(conditions, **prepare)
    sigma = torch.linspace(0.5, 2, len(tokens))
    with torch.no_grad():
        return model.log_posterior(model(tokens, sigma, prepared), prepared, where)


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_batched_branches_equal_single_ones(changes):
    model, conditions = build(**changes), clip_conditions()
    tokens = torch.randint(0, 17, (3, 12, 40))
    where = tokens == 16
    together = run(model, conditions, tokens, where, branches=BRANCHES)
    for i, branch in enumerate(BRANCHES):
        alone = run(model, conditions, tokens, where, branches=(branch,))[0]
        assert torch.allclose(together[i], alone, atol=1e-5), branch


def test_the_expression_branch_shares_the_low_stage():
    """Expression reaches only the high levels: five branches need four low passes, and levels 1-2 ignore it."""
    model, conditions = build(), clip_conditions()
    prepared = model.prepare(conditions, BRANCHES)
    assert [len(stage.cond) // 3 for stage in prepared.stages] == [4, 5]
    where = torch.zeros(3, 12, 40, dtype=torch.bool)
    where[:, :2] = True
    out = run(model, conditions, torch.full((3, 12, 40), 16), where, branches=("none", "expression"))
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_padding_changes_nothing(changes):
    model, conditions = build(**changes), clip_conditions()
    tokens = torch.randint(0, 17, (3, 12, 40))
    where = torch.zeros(3, 12, 40, dtype=torch.bool)
    where[1, :, :30] = True
    padded = run(model, conditions, tokens, where)
    alone = Conditions(
        conditions.lip[1:2, :15], conditions.identity[1:2], conditions.expression[1:2], conditions.frames[1:2]
    )
    prepared = model.prepare(alone)
    sigma = torch.linspace(0.5, 2, 3)[1:2]
    with torch.no_grad():
        single = model.log_posterior(model(tokens[1:2, :, :30], sigma, prepared), prepared, where[1:2, :, :30])
    assert torch.allclose(padded, single, atol=1e-5)


@pytest.mark.parametrize("name", ["lip", "identity", "expression"])
def test_a_dropped_condition_has_no_influence(name):
    model, conditions = build(), clip_conditions()
    others = [c for c in ("lip", "identity", "expression") if c != name]
    keep = torch.tensor([[c in others for c in ("lip", "identity", "expression")]] * 3)[None]
    changed = {field: getattr(conditions, field) for field in ("lip", "identity", "expression", "frames")}
    changed[name] = (changed[name] + 1) % 7 if name == "expression" else changed[name] + 1.0
    tokens = torch.full((3, 12, 40), 16)
    where = tokens == 16
    before, after = (run(model, c, tokens, where, keep=keep) for c in (conditions, Conditions(**changed)))
    assert torch.equal(before, after)
    assert not torch.equal(run(model, conditions, tokens, where), run(model, Conditions(**changed), tokens, where))


def test_a_new_network_is_uniform_and_its_temporal_scales_are_one():
    model = HiCoDiT(ModelConfig(**SMALL, face_dim=8))
    conditions = clip_conditions()
    prepared = model.prepare(conditions)
    assert torch.equal(prepared.stages[1].temporal, torch.ones_like(prepared.stages[1].temporal))
    tokens = torch.full((3, 12, 40), 16)
    out = run(model, conditions, tokens, tokens == 16)
    assert torch.allclose(out, torch.full_like(out, -torch.log(torch.tensor(16.0)).item()))


def test_single_scale_has_no_temporal_part():
    assert build(dual_scale=False).prepare(clip_conditions()).stages[1].temporal is None


def test_loss_is_cross_entropy_over_t_when_normalised_and_more_otherwise():
    log_q, x0, t = torch.randn(6, 16).log_softmax(-1), torch.randint(0, 16, (6,)), torch.full((6,), 0.25)
    loss = weighted_score_entropy(log_q, x0, t, LogLinearNoise())
    assert torch.allclose(loss, -log_q[range(6), x0] / 0.25, rtol=1e-4)
    assert (weighted_score_entropy(log_q + 0.5, x0, t, LogLinearNoise()) > loss).all()


def test_condition_dropout_rates():
    model = build(drop_all=0.2, drop_each=0.1)
    torch.manual_seed(0)
    keep = model.draw_keep(20_000, torch.device("cpu"))[0]
    assert abs((~keep).all(1).float().mean().item() - 0.2 - 0.8 * 0.001) < 0.01
    assert abs(keep.all(1).float().mean().item() - 0.8 * 0.729) < 0.01


def test_base_is_the_papers_size():
    with torch.device("meta"):
        model = HiCoDiT(ModelConfig())
    blocks = sum(p.numel() for stage in model.stages for p in stage.blocks.parameters())
    assert 120e6 < blocks < 130e6  # about 123 M with a 128-d AdaLN condition
    assert len(model.stages[0].blocks) == len(model.stages[1].blocks) == 8
    assert [len(stage.heads) for stage in model.stages] == [2, 10]


def test_expression_windows_vote_and_break_ties_by_probability():
    p = torch.full((25, 7), 0.01)
    p[:13, 1] = 0.9  # window 0 is frames 0..12, window 1 frames 13..24
    p[13:19, 2], p[19:, 4] = 0.5, 0.8  # six frames each: a tie that summed probability settles
    assert window_expressions(p).tolist() == [1, 4]
    assert len(window_expressions(p[:14])) == 2  # a last partial window counts
