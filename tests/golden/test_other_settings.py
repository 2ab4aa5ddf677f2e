"""A case with other settings than the public ones: made here from a public case, with outputs from plain formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from talker_t2av.diffusion_head import FlowHead
from tests.golden.check import check
from tests.golden.runners import Case, load_case
from tests.golden.runners.talker import draws_of, drop_rates, head_of, loaded

FOLDER = Path(__file__).parent


def public(name: str) -> Case:
    return load_case(FOLDER / f"{name}.safetensors")


def failures(case: Case) -> list[str]:
    """Names of the outputs that are off."""
    return [result.output for result in check(case) if not result.passed]


@pytest.mark.parametrize("mu_rate, cond_rate", [(0.5, 0.3), (0.0, 1.0), (0.2, 0.05)])
def test_a_flow_loss_with_other_dropout_rates(mu_rate, cond_rate):
    case = public("talker/cfm_loss_motion_mask")
    settings = {"cfm_params": {"training_cfg_rate": mu_rate, "training_cond_rate": cond_rate}}
    varied = replace(case, meta=case.meta | {"config": case.config | settings})
    i = case.inputs
    draws = draws_of(case)
    net = loaded(case, FlowHead(head_of(case))).estimator
    mu, cond, voice = (i[name].clone().requires_grad_() for name in ("mu", "cond", "global_cond"))
    mu_used = mu * (i["u_cfg"] > mu_rate).float()[:, None]
    cond_used = cond * (i["u_cond"] > cond_rate).float()[:, None, None]
    t = draws.t[:, None, None]
    noisy = (1 - t) * i["x1"] + t * i["z"]
    velocity = net(noisy, mu_used, draws.t, cond_used, voice)
    error = (velocity - (i["z"] - i["x1"])).square().mean(1, keepdim=True)
    loss = (error * i["tgt_mask"]).sum() / i["tgt_mask"].sum()
    loss.backward()
    outputs = {"mu_used": mu_used, "cond_used": cond_used, "v_pred": velocity, "loss": loss}
    outputs |= {"grad_mu": mu.grad, "grad_cond": cond.grad, "grad_global_cond": voice.grad}
    outputs = {name: value.detach() for name, value in outputs.items()}
    others = failures(replace(case, outputs=outputs))  # the published rates give other numbers
    assert {"loss", "mu_used"} <= set(others) and not failures(replace(varied, outputs=outputs))
    assert drop_rates(varied) == {"drop_mu": mu_rate, "drop_cond": cond_rate}
