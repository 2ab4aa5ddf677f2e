"""Golden cases `epfg_*`: multi-condition guidance. The cases also hold two readings, B and C, that are not offered."""

import torch

from hicodit.diffusion import LogLinearNoise, log_expm1
from hicodit.guidance import combine
from hicodit.settings import GuidanceScales
from tests.golden.runners import Case, runner

FORMS = {"A": "literal", "D": "normalised"}
SHORT = {"none": "u", "all": "all", "identity": "id", "expression": "emo", "lip": "lip"}


@runner("epfg_")
def guidance(case: Case):
    noise = LogLinearNoise(case.meta["eps"])
    t = case.inputs["t"]
    log_odds = -log_expm1(noise.sigma(t)).unsqueeze(-1)

    def guided(scale_set: str, reading: str) -> torch.Tensor:
        s = case.meta["scales"][scale_set]
        scales = GuidanceScales(s["all"], s["id"], s["emo"], s["lip"], FORMS[reading])
        log_p = torch.stack([case.inputs[f"log_p_{SHORT[branch]}"] for branch in scales.branches])
        return combine(log_p, scales, log_odds) + log_odds

    out = {f"log_score.{name}.{reading}": guided(name, reading) for name in case.meta["scales"] for reading in FORMS}
    for output in case.outputs:
        if output.endswith((".B", ".C")):
            case.skip(output, "not offered")
    if "euler_unmask_prob_per_dt" in case.outputs:
        # The stored rates are those of one scale set: LRS3 where it is there. Only the rows of A and D are compared.
        name = "lrs3" if "lrs3" in case.meta["scales"] else next(iter(case.meta["scales"]))
        rates = case.outputs["euler_unmask_prob_per_dt"].clone()
        for row, reading in ((0, "A"), (3, "D")):
            rates[row] = noise.rate(t) * guided(name, reading).exp().sum(-1)
        out["euler_unmask_prob_per_dt"] = rates
    return {name: value for name, value in out.items() if name in case.outputs}
