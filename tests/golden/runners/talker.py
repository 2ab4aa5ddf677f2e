"""Runners for Talker-T2AV's parts and its training forward, chosen by the case's `meta["runner"]`.

Axes: B batch, T tokens, C channels, P frames of a patch, n solver steps.
"""

from typing import Any

import torch
from torch import Tensor, nn

from engine.release import load_strict
from talker_t2av import flow_matching as flow
from talker_t2av.diffusion_head import DiffusionHead, FlowHead, TimeMLP, time_features
from talker_t2av.layers import Block, PatchEncoder, Rotary, rotate
from talker_t2av.losses import IGNORED, stop_labels, training_forward, training_losses
from talker_t2av.model import STOP_WEIGHT, StopPredictor, TalkerConfig, TalkerT2AV
from talker_t2av.upstream import LM_HEAD, complete
from tests.golden.runners import Case, runner

TRAINED_APART = "encoders run before training; its batches hold what they returned"


def part_weights(case: Case) -> dict[str, Tensor]:
    """Filled tensors by released name: tables that modules compute and the tied output layer are not filled."""
    return case.weights(lambda key: key != LM_HEAD and not key.endswith("rope.w"))


def loaded(case: Case, module: nn.Module) -> nn.Module:
    """`module` with the case's weights and its own tables."""
    load_strict(module, complete(part_weights(case), module), case.name)
    return module.eval()


def head_of(case: Case) -> DiffusionHead:
    c = case.config
    return DiffusionHead(
        c["in_channels"], c["global_cond_channels"], c["hidden_size"], c["n_layer"], c["n_head"], _positions(case)
    )


def _positions(case: Case) -> int:
    """Rows of the rotary tables."""
    return next((shape[0] for key, shape in case.keys.items() if key.endswith("rope.w")), 1024)


def talker(case: Case) -> TalkerT2AV:
    """The whole model of a case."""
    c = case.config
    config = TalkerConfig(
        llm=c["qwen"],
        patch_size=c["patch_size"],
        delay=c["delay"],
        context=c["context_patches"],
        speech_dim=c["speech_dim"],
        motion_dim=c["motion_dim"],
        speaker_dim=case.keys["speech_cfm.estimator.global_cond_proj.weight"][1],
        encoder_layers=c["patch_encoder"]["n_layer"],
        encoder_heads=c["patch_encoder"]["n_head"],
        head_layers=c["dit"]["n_layer"],
        head_heads=c["dit"]["n_head"],
        max_positions=_positions(case),
        repeats=c["cfm_k_repeat"],
        motion_weight=c["motion_cfm_weight"],
        **drop_rates(case),
    )
    return TalkerT2AV.from_upstream(part_weights(case), config)


@runner("rope")
def run_rotary(case: Case) -> dict[str, Tensor]:
    c = case.config
    rotary = Rotary(c["head_dim"], c["max_len"], c["base"])
    x = case.inputs["x"]
    return {"y": rotate(x, *rotary.factors(x.shape[1])), "w": rotary.w[: len(case.outputs["w"])]}


@runner("time_embedding")
@torch.no_grad()
def run_time_embedding(case: Case) -> dict[str, Tensor]:
    width = case.config["dim"]
    t = case.inputs["t"]
    return {"emb": time_features(t, width), "mlp": loaded(case, TimeMLP(width))(t)}


@runner("block")
@torch.no_grad()
def run_block(case: Case) -> dict[str, Tensor]:
    width = case.config["n_embd"]
    heads = case.config["n_head"]
    block = loaded(case, Block(width, heads))
    x = case.inputs["x"]
    factors = Rotary(width // heads).factors(x.shape[1]) if case.config.get("rope", True) else None
    normed = block.norm1(x)
    return {
        "norm1": normed,
        "attn": block.attn(normed, factors),
        "mlp": block.mlp(block.norm2(x)),
        "y": block(x, factors),
    }


@runner("patch_encoder")
@torch.no_grad()
def run_patch_encoder(case: Case) -> dict[str, Tensor]:
    c = case.config
    encoder = PatchEncoder(c["input_dim"], c["hidden_size"], c["n_layer"], c["n_head"], _positions(case))
    return {"y": loaded(case, encoder)(case.inputs["x"])}


@runner("locdit")
@torch.no_grad()
def run_head(case: Case) -> dict[str, Tensor]:
    i = case.inputs
    return {"y": loaded(case, head_of(case))(i["x"], i["mu"], i["t"], i["cond"], i["global_cond"], i.get("dt"))}


@runner("cfm_sample")
@torch.no_grad()
def run_sampler(case: Case) -> dict[str, Any]:
    """The sample as it is drawn, and the solver's path with both branches evaluated at every step."""
    head = loaded(case, FlowHead(head_of(case)))
    i = case.inputs
    args = case.meta["args"]
    steps = args["n_timesteps"]
    guidance = args["cfg_value"]
    sway = args.get("sway_sampling_coef", 1.0)
    star = args.get("use_cfg_zero_star", True)
    given = (i["mu"], i["cond"], i["global_cond"])
    schedule = head.schedule(steps, sway)
    times = schedule.times
    evaluate = head.branches(*given, schedule, unconditional=True)
    path: dict[str, list[Tensor]] = {name: [] for name in ("est_t", "est_x", "est_v_cond", "est_v_uncond")}

    def velocity(x: Tensor, step: int) -> Tensor:
        both = evaluate(x, step)
        for seen, value in zip(path.values(), (times[step], x, *both)):
            seen.append(value)
        return flow.guide(*both, guidance, star)

    skip = flow.zero_steps(steps) if star else 0
    flow.euler(velocity, args["temperature"] * i["noise"], schedule.lengths, skip)
    out = {name: torch.stack(seen) for name, seen in path.items() if seen}
    x = head.sample(*given, i["noise"], schedule, args["temperature"], guidance, star)
    return out | {"x": x, "t_span": times, "n_estimator_calls": torch.tensor(len(path["est_t"]))}


def drop_rates(case: Case) -> dict[str, float]:
    """Training probabilities of dropping mu and the context; the published ones where the case names none."""
    settings = case.config.get("cfm_params", {})
    cond = next((settings[name] for name in settings if "cond" in name and "noise" not in name), flow.DROP_COND)
    return {"drop_mu": settings.get("training_cfg_rate", flow.DROP_MU), "drop_cond": cond}


def draws_of(case: Case, prefix: str = "") -> flow.FlowDraws:
    """A case's draws; log-normal times where it has normal ones, else the second of its uniform ones.

    A program that never drops a condition may draw nothing for it: then it is kept.
    """
    inputs = case.inputs
    normal = inputs.get(f"{prefix}s_t")
    t = flow.logit_normal_times(normal) if normal is not None else inputs[f"{prefix}u_t"]
    u_mu, u_cond = (inputs.get(prefix + name, torch.ones_like(t)) for name in ("u_cfg", "u_cond"))
    return flow.FlowDraws(u_mu, u_cond, t, inputs[f"{prefix}z"])


def gradient_norms(module: nn.Module, keys: list[str]) -> Tensor:
    """L2 norm of each parameter's gradient, 0 where there is none."""
    named = dict(module.named_parameters())
    return torch.stack([named[k].grad.norm() if named[k].grad is not None else torch.tensor(0.0) for k in keys])


@runner("cfm_loss")
def run_flow_loss(case: Case) -> dict[str, Tensor]:
    head = loaded(case, FlowHead(head_of(case), **drop_rates(case)))
    i = case.inputs
    draws = draws_of(case)
    mu, cond, global_cond = (i[name].clone().requires_grad_() for name in ("mu", "cond", "global_cond"))
    loss = head.loss(i["x1"], mu, cond, global_cond, draws, i.get("tgt_mask"))
    loss.backward()
    noisy = flow.noised(i["x1"], draws)
    mu_used = flow.drop(i["mu"], draws.u_mu, head.drop_mu)
    cond_used = flow.drop(i["cond"], draws.u_cond, head.drop_cond)
    return {
        "loss": loss,
        "grad_mu": mu.grad,
        "grad_cond": cond.grad,
        "grad_global_cond": global_cond.grad,
        "grad_norm": gradient_norms(head, case.meta["grad_norm_keys"]),
        "t": draws.t,
        "dt": torch.zeros_like(draws.t),
        "y": noisy,
        "mu_used": mu_used,
        "cond_used": cond_used,
        "v_pred": head.estimator(noisy, mu_used, draws.t, cond_used, i["global_cond"]),
    }


@runner("stop_labels")
def run_stop_labels(case: Case) -> dict[str, Tensor]:
    options = {k: v for k, v in case.meta["args"].items() if k != "T"}
    labels, weight = stop_labels(case.inputs["start"], case.inputs["length"], case.meta["args"]["T"], **options)
    return {"labels": labels, "pos_weight": weight}


@runner("stop_predictor")
@torch.no_grad()
def run_stop_predictor(case: Case) -> dict[str, Tensor]:
    return {"logits": loaded(case, StopPredictor(case.config["dim"]))(case.inputs["x"])}


@runner("llm_forward")
def run_training_forward(case: Case) -> dict[str, Any]:
    model = talker(case)
    i = case.inputs
    batch = {
        "input_ids": i["input_ids"],
        "attention_mask": i["attention_mask"],
        "speech_span": i["speech_span"],
        "speech": i["speech_latent"],
        "speech_frames": i["mel_len"],
        "motion": i["motion"],
        "motion_frames": i["motion_len"],
        "speaker": i["speaker_emb"],
    }
    forward = training_forward(model, batch)
    draws = {name: draws_of(case, f"draw.{name}.") if f"draw.{name}.z" in i else None for name in ("speech", "motion")}
    dummy = len(forward.motion.x1) == 0
    if dummy:
        draws["motion"] = None  # the official program draws for an example that it multiplies by 0
    losses = training_losses(model, forward, **draws)
    losses["loss"].backward()

    real = forward.mask.bool()
    out: dict[str, Any] = {
        "attention_mask": forward.mask,
        "inputs_embeds": torch.where(real[..., None], forward.embeds, case.outputs["inputs_embeds"]),
        "hidden": torch.where(real[..., None], forward.hidden, case.outputs["hidden"]),
        "loss_speech_cfm": losses["speech"],
        "loss_motion_cfm": losses["motion"] / model.config.motion_weight,
        "loss_stop": losses["stop"],
        "loss_total": losses["loss"],
        "stop_labels": forward.labels,
        "stop_logits_selected": model.head_stop(forward.hidden)[forward.labels != IGNORED],
        "stop_pos_weight_raw": forward.pos_weight,
        "stop_pos_weight_used": STOP_WEIGHT * forward.pos_weight,
        "motion_is_dummy": torch.tensor(int(dummy)),
        "grad_norm": gradient_norms(model, case.meta["grad_norm_keys"]),
    }
    unreached = case.outputs["grad_norm"] < 0  # the case's sign for "no gradient", which is a zero one here
    out["grad_norm"] = torch.where(unreached & (out["grad_norm"] == 0), case.outputs["grad_norm"], out["grad_norm"])
    for name, examples in (("speech", forward.speech), ("motion", forward.motion)):
        t = draws[name].t if draws[name] else None
        for output, value in {**vars(examples), "t": t}.items():
            if len(examples.x1) == 0:
                case.skip(f"{name}.{output}", "of a dummy example, which is not needed here")
            else:
                out[f"{name}.{output}"] = value
    for name in ("codec_audio_shape", "spk_audio_shape"):
        case.skip(name, TRAINED_APART)
    for name in case.outputs:
        if "dummy_before" in name:
            case.skip(name, "of a dummy example, which is not needed here")
    return out
