"""Golden cases `sedd_*`: absorbing-state diffusion, its loss, its samplers, and a small SEDD network."""

import torch

from hicodit import diffusion as dd
from tests.golden.runners import Case, runner
from tests.reference import sedd


def _noise(case: Case) -> dd.LogLinearNoise:
    return dd.LogLinearNoise(case.meta.get("eps", case.meta.get("noise_eps", 1e-3)))


@runner("sedd_noise")
def noise(case: Case):
    out = {}
    for name in case.outputs:
        kind, eps = name.split(".eps")
        out[name] = getattr(dd.LogLinearNoise(float(eps)), kind)(case.inputs["t"])
    return out


@runner("sedd_graph")
def graph(case: Case):
    x = case.inputs["x"]
    score = case.inputs["score"]
    mask_id = case.meta["n"]
    sigma = case.inputs["sigma"][:, 0]
    dsigma = case.inputs["dsigma"][:, 0]
    return {
        "rate": sedd.rate(x, mask_id, score.dtype),
        "transp_rate": sedd.transposed_rate(x, mask_id, score.dtype),
        "transp_transition": sedd.transposed_transition(x, sigma, mask_id),
        "reverse_rate": sedd.reverse_rate(x, score, mask_id),
        "staggered_score": sedd.staggered_score(score, dsigma),
        "sample_limit": torch.full_like(x, mask_id),
    }


@runner("sedd_perturb")
def perturb(case: Case):
    sigma = _noise(case).sigma(case.inputs["t"])
    masked = dd.masked_at(sigma, case.inputs["u"])
    return {"sigma": sigma, "xt": torch.where(masked, case.meta["n"], case.inputs["x0"])}


@runner("sedd_dse")
def score_entropy(case: Case):
    i = case.inputs
    schedule = _noise(case)
    sigma = schedule.sigma(i["t"])
    dsigma = schedule.rate(i["t"])
    entropy = sedd.score_entropy(i["log_score"], i["xt"], i["x0"], sigma, case.meta["n"])
    return {"sigma": sigma, "dsigma": dsigma, "entropy": entropy, "loss": (dsigma[:, None] * entropy).sum(1)}


@runner("sedd_ce")
def cross_entropy(case: Case):
    """The normalised posterior's loss must equal the score entropy of the same scores."""
    i = case.inputs
    schedule = _noise(case)
    mask_id = case.meta["n"]
    sigma = schedule.sigma(i["t"])
    log_q = i["logits"].log_softmax(-1)
    raw = torch.nn.functional.pad(log_q - dd.log_expm1(sigma)[:, None, None], (0, 1))
    log_score = sedd.to_log_score(raw, i["xt"], sigma, scale_by_sigma=False)
    masked = i["xt"] == mask_id
    t = i["t"][:, None].expand_as(i["xt"])
    token_loss = torch.zeros_like(t)
    token_loss[masked] = dd.weighted_score_entropy(log_q[masked], i["x0"][masked], t[masked], schedule)
    return {
        "log_score": log_score,
        "entropy": sedd.score_entropy(log_score, i["xt"], i["x0"], sigma, mask_id),
        "loss": token_loss.sum(1),
    }


@runner("sedd_categorical")
def categorical(case: Case):
    u = case.inputs["u"]
    return {"exp_noise": dd.exponential_noise(u), "index": sedd.sample_categorical(case.inputs["probs"], u)}


@runner("sedd_step")
def steps(case: Case):
    i = case.inputs
    schedule = _noise(case)
    n = case.meta["n"]
    score = i["log_score"].exp()
    x = i["x"]
    t = i["t"][:, 0]
    h = i["step"][:, 0]
    weights = {
        "euler": sedd.euler_weights(score, x, t, h, schedule, n),
        "analytic": sedd.analytic_weights(score, x, t, h, schedule, n),
        "denoise": sedd.denoise_weights(score, x, t, schedule, n),
    }
    out = {}
    for name, value in weights.items():
        out[f"p_{name}"] = value
        out[f"p_mask_{name}"] = value[..., -1]
        out[f"p_{name}_sum"] = value.sum(-1)
        if f"u_{name}" in i:
            out[f"x_{name}"] = sedd.sample_categorical(value, i[f"u_{name}"])
    return {name: value for name, value in out.items() if name in case.outputs}


def _network(case: Case) -> sedd.SEDDNetwork:
    model = case.config["model"]
    network = sedd.SEDDNetwork(
        tokens=case.config["tokens"],
        width=model["hidden_size"],
        cond_dim=model["cond_dim"],
        blocks=model["n_blocks"],
        heads=model["n_heads"],
        scale_by_sigma=model["scale_by_sigma"],
    )
    network.load_released(case.weights())
    return network.eval()


@runner("sedd_net")
def network(case: Case):
    with torch.no_grad():
        return {"log_score": _network(case)(case.inputs["indices"], case.inputs["sigma"])}


@runner("sedd_sampler")
def sampler(case: Case):
    net = _network(case)
    meta = case.meta
    uniforms = [case.inputs[f"u{i}"] for i in range(meta["steps"] + 1)]
    with torch.no_grad():
        tokens, trace, times = sedd.race_sampler(
            lambda x, sigma: net(x, sigma).exp(),
            torch.full(uniforms[0].shape[:-1], meta["config"]["tokens"]),
            steps=meta["steps"],
            noise=_noise(case),
            mask_id=meta["config"]["tokens"],
            predictor=meta["predictor"],
            end=meta["eps_t"],
            uniforms=iter(uniforms),
        )
    return {"x": tokens, "trace": trace, "timesteps": times}


@runner("sedd_levels")
def levels(case: Case):
    i = case.inputs
    schedule = _noise(case)
    n = case.meta["n"]
    sigma = schedule.sigma(i["t"])
    rate = schedule.rate(i["t"])
    xt = torch.where(dd.masked_at(sigma, i["u"]), n, i["x0"])
    entropy = sedd.score_entropy(i["log_score"], xt, i["x0"], sigma, n)
    per_level = (rate[:, None, None] * entropy).sum(2)
    return {"xt": xt, "entropy": entropy, "loss_per_level": per_level, "loss": per_level.sum(1)}
