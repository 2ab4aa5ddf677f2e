"""Packed batches: what goes in comes out, and attention stays inside each clip."""

import pytest
import torch
import torch.nn.functional as F

from engine.nn.packing import Packing

LENGTHS = [5, 2, 7, 1]


def packing():
    return Packing.of(torch.arange(7) < torch.tensor(LENGTHS)[:, None])


def test_clips_lie_behind_each_other_and_come_back():
    p, x = packing(), torch.randn(4, 7, 3)
    packed = p.pack(x)
    assert torch.equal(packed, torch.cat([clip[:n] for clip, n in zip(x, LENGTHS)]))
    assert p.bounds.tolist() == [0, 5, 7, 14, 15] and p.longest == 7
    assert p.row.tolist() == [0] * 5 + [1] * 2 + [2] * 7 + [3] and p.position[5:9].tolist() == [0, 1, 0, 1]
    back = p.unpack(packed)
    assert torch.equal(back, x * p.valid[..., None])


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_each_clip_alone(causal):
    p = packing()
    q, k, v = torch.randn(3, 2, 15, 4, requires_grad=True)

    def dense(*padded):
        mask = p.valid[:, None, None] & (torch.ones(7, 7).tril().bool() if causal else torch.ones(7, 7).bool())
        return F.scaled_dot_product_attention(*padded, attn_mask=mask)

    out = p.attend(q, k, v, dense, causal)
    alone = [
        F.scaled_dot_product_attention(*(x[:, a:b] for x in (q, k, v)), is_causal=causal)
        for a, b in zip(p.bounds.tolist(), p.bounds.tolist()[1:])
    ]
    torch.testing.assert_close(out, torch.cat(alone, 1))
