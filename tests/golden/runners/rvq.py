"""Runners of the RVQ codec, its discriminators and its losses. Axes: B batch, C channels, Q levels, T frames."""

from typing import Any

import torch
from torch import Tensor

from engine.nn.audio_losses import (
    MelSpectrogram,
    MultiResolutionSTFTLoss,
    MultiScaleMelLoss,
    discriminator_loss,
    generator_loss,
    mel_filters,
)
from engine.nn.dac import DACEncoder
from engine.nn.discriminators import MultiPeriodDiscriminator, MultiResolutionDiscriminator
from engine.official import rename_all
from engine.release import load_strict
from rvq_codec.codec import RVQCodecConfig, build_decoder, build_quantizer
from rvq_codec.upstream import RULES
from tests.golden.runners import Case, runner

ENCODER = {
    "d_model": "encoder_width",
    "up_ratios": "ratios",
    "out_channels": "latent_channels",
    "use_tanh": "encoder_tanh",
}
DECODER = {
    "in_channels": "latent_channels",
    "num_quantizers": "levels",
    "codebook_size": "codebook_size",
    "codebook_dim": "codebook_dim",
    "use_l2_normlize": "normalize",
    "quantizer_dropout": "quantizer_dropout",
    "commitment": "commitment",
    "codebook_loss_weight": "codebook",
    "vocos_dim": "vocos_dim",
    "vocos_intermediate_dim": "vocos_intermediate",
    "vocos_num_layers": "vocos_layers",
    "n_fft": "n_fft",
    "hop_size": "hop",
    "upsample_initial_channel": "conv_width",
    "up_ratios": "conv_ratios",
}


def config_of(arguments: dict[str, Any]) -> RVQCodecConfig:
    """From the official constructor arguments of the encoder or of the decoder; those of other branches are ignored."""
    if "d_model" in arguments:
        return RVQCodecConfig(**{ours: arguments[theirs] for theirs, ours in ENCODER.items() if theirs in arguments})
    fields = {ours: arguments[theirs] for theirs, ours in DECODER.items() if theirs in arguments}
    return RVQCodecConfig(decoder="vocos" if arguments.get("use_vocos", False) else "conv", **fields)


def _strip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@runner("mgct_")
def run_codec(case: Case) -> dict[str, Tensor]:
    if "d_model" in case.config:
        return _run_encoder(case)
    if "loss" in case.outputs:
        return _run_quantizer_training(case)
    return _run_decoder(case)


@torch.no_grad()
def _run_encoder(case: Case) -> dict[str, Tensor]:
    config = config_of(case.config)
    encoder = DACEncoder(config.encoder_width, config.ratios, config.latent_channels, config.encoder_tanh).eval()
    load_strict(encoder, _strip(rename_all(case.weights(), RULES), "encoder."), case.name)
    out = {}
    for name, wave in case.inputs.items():
        z = encoder(wave)
        assert z.shape[-1] == encoder.frames(wave.shape[-1]), "length rule"
        out["z" + name.removeprefix("wav")] = z
    return out


@torch.no_grad()
def _run_decoder(case: Case) -> dict[str, Tensor]:
    config = config_of(case.config)
    quantizer = build_quantizer(config).eval()
    decoder = build_decoder(config).eval()
    state = rename_all(case.weights(), RULES if config.decoder == "vocos" else ((r"^model", "decoder.model"),))
    load_strict(quantizer, _strip(state, "quantizer."), case.name)
    load_strict(decoder, _strip(state, "decoder."), case.name)

    z = case.inputs["z"]
    full = quantizer(z)
    out = {
        "codes": quantizer.quantize(z).transpose(0, 1),
        "quantized": full.latent,
        "vq2emb": quantizer.embed(full.codes),
        "all_quantized_0": quantizer.quantizers[0](z)[0],
        "decode": decoder(quantizer.embed(full.codes)),
        "decode_z": decoder(z),
        "decode_T1": decoder(z[:, :, :1]),
    }
    if config.decoder == "vocos":
        out["backbone"] = decoder.backbone(z)
        out["head_linear"] = decoder.head.out(out["backbone"])
    for name in case.outputs:
        kind, _, levels = name.rpartition("_")
        if kind in ("quantized", "vq2emb") and levels.isdigit():
            few = quantizer(z, int(levels))
            out[name] = few.latent if kind == "quantized" else quantizer.embed(full.codes, int(levels))
    out["margin"] = _margin(quantizer.double(), z.double())
    return out


def _margin(quantizer, z: Tensor) -> Tensor:
    """Gap (Q, B, T) between the best and the second best distance, in the precision of `quantizer`."""
    gaps = []
    residual = z
    for level in quantizer.quantizers:
        nearest = level.distances(level.in_project(residual)).topk(2, largest=False).values
        gaps.append(nearest[..., 1] - nearest[..., 0])
        residual = residual - level(residual)[0]
    return torch.stack(gaps)


def _run_quantizer_training(case: Case) -> dict[str, Tensor]:
    quantizer = build_quantizer(config_of(case.config)).train()
    load_strict(quantizer, case.weights(), case.name)
    z = case.inputs["z"].clone().requires_grad_()
    result = quantizer(z)
    loss = (result.latent * case.inputs["w"]).sum() + result.commitment.sum() + result.codebook.sum()
    loss.backward()
    first = quantizer.quantizers[0]
    last = quantizer.quantizers[-1]
    out = {
        "quantized": result.latent,
        "codes": result.codes.transpose(0, 1),
        "commit_losses": result.commitment,
        "codebook_losses": result.codebook,
        "loss": loss.reshape(1),
        "grad_z": z.grad,
        "grad_codebook_0": first.codebook.weight.grad,
        "grad_codebook_last": last.codebook.weight.grad,
    }
    if first.projected:
        out["grad_in_v_0"] = first.in_project.weight_v.grad
        out["grad_in_g_0"] = first.in_project.weight_g.grad
        out["grad_out_v_0"] = first.out_project.weight_v.grad
    return {name: value.detach() for name, value in out.items()}


def _discriminate(case: Case, discriminator: torch.nn.Module, step: int = 997) -> dict[str, Tensor]:
    load_strict(discriminator, case.weights(), case.name)
    with torch.no_grad():
        results = discriminator.eval()(case.inputs["wav"])
    out = {}
    for i, maps in enumerate(results):
        out[f"logit_{i}"] = maps[-1]
        out |= {f"feat_{i}_{j}_strided": x.flatten()[::step] for j, x in enumerate(maps[:-1])}
    return out


@runner("disc_mpd")
def run_period_discriminator(case: Case) -> dict[str, Tensor]:
    c = case.config
    sizes = {"growth": c["channel_increasing_factor"], "max_channels": c["max_downsample_channels"]}
    return _discriminate(case, MultiPeriodDiscriminator(c["periods"], channels=c["channels"], **sizes))


@runner("disc_spec")
def run_spectrogram_discriminator(case: Case) -> dict[str, Tensor]:
    c = case.config
    stft = case.config["stft_params"]
    sizes = {"max_channels": c["max_downsample_channels"], "strides": c["downsample_scales"]}
    sizes |= {"channels": c["channels"], "kernels": c["kernel_sizes"]}
    windows = stft["fft_sizes"], stft["hop_sizes"], stft["win_lengths"]
    return _discriminate(case, MultiResolutionDiscriminator(*windows, **sizes))


def _learning_rate(step: int) -> float:
    """X-Codec-2.0's own schedule, which nothing here trains with: quadratic from 1e-5 to 1e-4, then linear to 2e-5."""
    if step < 3000:
        return 1e-5 + 9e-5 * (step / 3000) ** 2
    return 1e-4 - 8e-5 * min(1.0, (step - 3000) / 400_000)


@runner("codec_losses")
def run_losses(case: Case) -> dict[str, Tensor]:
    n_mels = case.config["n_mels"]
    windows = case.config["window_lengths"]
    real = case.inputs["real"]
    fake = case.inputs["fake"]
    bands = dict(zip(windows, n_mels, strict=True))
    out = {}
    for name in case.outputs:
        parts = name.split("_")
        if name.startswith("mel_loss_") and name.endswith("_grad_fake"):
            rate = int(parts[2])
            x = fake.clone().requires_grad_()
            loss = MultiScaleMelLoss(rate, n_mels, windows, case.config["clamp"])(x, real)
            loss.backward()
            out[name] = x.grad
            out[f"mel_loss_{rate}"] = loss.detach().reshape(1)
        elif parts[0] == "mel" and name.endswith("_strided"):
            rate = int(parts[1])
            window = int(parts[2])
            out[name] = MelSpectrogram(rate, bands[window], window)(real).flatten()[::211]
        elif parts[0] == "melfb":
            rate = int(parts[1])
            window = int(parts[2])
            out[name] = mel_filters(rate, window, bands[window]).flatten()[::53]
    out["stft_loss"] = MultiResolutionSTFTLoss()(fake, real).reshape(1)
    on_real, on_fake = discriminator_loss([[case.inputs["disc_real"]]], [[case.inputs["disc_fake"]]])
    out["gan_disc_real"] = on_real.reshape(1)
    out["gan_disc_fake"] = on_fake.reshape(1)
    out["gan_gen"] = generator_loss([[case.inputs["disc_fake"]]]).reshape(1)
    out["warmup_lr"] = torch.tensor([_learning_rate(step) for step in case.meta["lr_steps"]], dtype=torch.float64)
    return out
