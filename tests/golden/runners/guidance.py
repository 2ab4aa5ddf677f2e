"""Golden cases `epfg_*`: the four readings of multi-condition guidance."""

from __future__ import annotations

import torch

from hicodit.diffusion import LogLinearNoise, log_expm1
from hicodit.guidance import combine
from hicodit.settings import READINGS, GuidanceScales
from tests.golden.runners import Case, runner

SHORT = {"none": "u", "all": "all", "identity": "id", "expression": "emo", "lip": "lip"}


@runner("epfg_")
def guidance(case: Case):
    noise, t = LogLinearNoise(case.meta["eps"]), case.inputs["t"]
    log_odds = -log_expm1(noise.sigma(t)).unsqueeze(-1)

    def guided(scale_set: str, reading: str) -> torch.Tensor:
        s = case.meta["scales"][scale_set]
        scales = GuidanceScales(s["all"], s["id"], s["emo"], s["lip"], reading)
        log_p = torch.stack([case.inputs[f"log_p_{SHORT[branch]}"] for branch in scales.branches])
        return combine(log_p, scales, log_odds) + log_odds

    out = {f"log_score.{name}.{r}": guided(name, r) for name in case.meta["scales"] for r in READINGS}
    if "euler_unmask_prob_per_dt" in case.outputs:
        # The stored rates are those of one scale set: LRS3 where it is there.
        name = "lrs3" if "lrs3" in case.meta["scales"] else next(iter(case.meta["scales"]))
        reveal = torch.stack([guided(name, r).exp().sum(-1) for r in READINGS])
        out["euler_unmask_prob_per_dt"] = noise.rate(t) * reveal
    return {name: value for name, value in out.items() if name in case.outputs}
