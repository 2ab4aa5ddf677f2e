"""Runners for Talker-T2AV's training samples (`dataset`) and its generation (`gen_*`), chosen by `meta["runner"]`.

Axes: B batch, T tokens, F speech frames, Fm motion frames, P frames of a patch, S steps, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.nn.mel import RATE, log_mel, pad_or_trim
from talker_t2av.data import Layout, MotionStats, collate, cut_recording, repeated, window_range
from talker_t2av.generation import Collector, Result, generate_steps, given_tokens, prefill
from talker_t2av.request import (
    GENERATE_SPEECH,
    GENERATE_SPEECH_MOTION,
    MODES,
    SCRIPT,
    Compat,
    Mode,
    Request,
    Sampling,
)
from tests.golden.runners import Case, meta_runner
from tests.golden.runners.talker import talker

WINDOW = 30 * RATE
STALE_DELAY = 5  # the script counts its placeholders with a constant of its own; only the first one matters


@meta_runner("dataset")
def run_dataset(case: Case) -> dict[str, Any]:
    args, i = case.meta["args"], case.inputs
    layout = Layout(
        args["speech_token_id"], i["tail_ids"].tolist(), args["patch_size"], args["delay"], args["model_max_length"]
    )
    stats = MotionStats(i["motion_mean"], i["motion_std"])
    out: dict[str, Any] = {}
    items, tasks = [], {"t2sv": [], "tts": []}
    for n, item in enumerate(args["items"]):
        tasks[item["task"]].append(item)
        raw = i.get(f"motion_raw.{n}", torch.zeros(0, len(stats.mean)))
        ramp = torch.arange(item["n24"], dtype=torch.float32)
        recording = cut_recording(ramp, ramp[: 2 * len(ramp) // 3], stats.normalise(raw), item["start"])
        sample = layout.example(
            i[f"text_ids.{n}"].tolist(), torch.zeros(0, 1), recording.speech_frames, recording.motion, torch.zeros(1)
        )
        wave16 = pad_or_trim(recording.wave16, WINDOW)
        items.append(sample | {"audio": recording.wave, "audio16k": wave16})
        fields = {
            "mel_len": sample["speech_frames"],
            "motion_len": sample["motion_frames"],
            "task_tag": (sample["motion_frames"] > 0).long(),
            "speech_span": sample["speech_span"],
            "input_ids": sample["input_ids"],
            "motion_shape": torch.tensor(sample["motion"].shape),
            "motion_first": sample["motion"][:1],
            "motion_last": sample["motion"][-1:],
            "audio_shape": torch.tensor([1, len(recording.wave)]),
            "audio16k_shape": torch.tensor([1, len(wave16)]),
            "audio_first_sample": recording.wave[0],
            "audio16k_first_sample": wave16[0],
            "crop_range_hi": torch.tensor(window_range(len(raw))),
        }
        out |= {f"{name}.{n}": value for name, value in fields.items()}
    batch = collate(items, args["pad_token_id"], args["patch_size"])
    out |= {
        "batch.input_ids": batch["input_ids"],
        "batch.attention_mask": batch["attention_mask"],
        "batch.speech_span": batch["speech_span"],
        "batch.mel_len": batch["speech_frames"],
        "batch.motion_len": batch["motion_frames"],
        "batch.motion": batch["motion"],
        "batch.motion_shape": torch.tensor(batch["motion"].shape),
        "batch.task_tag": (batch["motion_frames"] > 0).long(),
        "batch.audio_shape": torch.tensor(batch["audio"][:, None].shape),
        "batch.audio16k_shape": torch.tensor(batch["audio16k"][:, None].shape),
        "batch.feat_shape": torch.tensor(log_mel(batch["audio16k"])[:, None].shape),
        "n_rows": torch.tensor(sum(map(len, repeated(tasks["t2sv"], tasks["tts"])))),
    }
    return {name: value for name, value in out.items() if name in case.outputs}


class Given:
    """Noise as a case gives it: one tensor a new patch of a stream."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.inputs = inputs

    def __call__(self, stream: str, row: int, patch: int) -> Tensor:
        return self.inputs[f"noise_{stream}"][patch, row]


@torch.no_grad()
def run_loop(case: Case, request: Request, mode: Mode, compat: Compat) -> tuple[dict[str, Any], Result]:
    """The loop's outputs that all routines have in common, and the new frames."""
    model, kw = talker(case), case.meta["args"]["kw"]
    sampling = Sampling(kw["cfm_steps"], kw["cfm_temperature"], kw["cfm_cfg"])
    use_stop = kw.get("use_stop", case.meta["args"].get("use_stop", False))
    embeds = prefill(model, [request], mode, compat, *given_tokens(model, [request], mode))[0]
    collect = Collector(model, [request], mode, compat)
    hidden, tokens, stops, motion_steps = [], [], [], 0
    for step in generate_steps(model, [request], mode, sampling, compat, Given(case.inputs), use_stop):
        collect.add(step)
        stops += [] if step.stop is None else [step.stop]
        motion_steps += step.motion is not None
        if step.rows:
            hidden.append(step.hidden)
            tokens.append(step.token)
    tokens = torch.cat(tokens)
    # The loop feeds no token after which nothing is drawn; that state is the last one of a pass without a cache.
    last = model.backbone(torch.cat([embeds, tokens])[None])[:, -1]
    out = {
        "prefill_embeds": embeds[None],
        "step_tokens": tokens,
        "h": torch.cat([*hidden, last]),
        "stop_prob": torch.cat(stops) if stops else torch.zeros(0),
        "n_steps": torch.tensor(len(tokens)),
        "n_motion_steps": torch.tensor(motion_steps),
    }
    for name in ("codec_audio_shape", "spk_audio_shape"):
        case.skip(name, "latents and speaker embeddings are made before generation")
    return out, collect.results()[0]


@meta_runner("gen_speech", "gen_speech_motion")
def run_method(case: Case) -> dict[str, Any]:
    """The library's two methods: with and without motion."""
    i, c, kw = case.inputs, case.config, case.meta["args"]["kw"]
    motion = case.meta["runner"] == "gen_speech_motion"
    compat = GENERATE_SPEECH_MOTION if motion else GENERATE_SPEECH
    size, count = c["patch_size"], int(i["mel_len"][0])
    frames = compat.prefix_frames(kw["prefix_seconds"], count, size)
    speech = i["speech_latent"][0, :frames]
    prefix = -(-frames // size)
    request = Request(
        i["input_ids"][0, : int(i["speech_span"][0, 0])].tolist(),
        i["speaker_emb"][0],
        speech,
        torch.zeros(0, c["motion_dim"]),
        i.get("first_motion"),
        prefix,
        compat.limit(-(-count // size), prefix, c["delay"] if motion else 0),
    )
    out, result = run_loop(case, request, MODES["t2av" if motion else "tts"], compat)
    whole = torch.cat([speech, result.speech])[None]
    parts = [whole, speech[None], result.speech[None]] if frames else [whole, result.speech[None]]
    out |= {f"decoded_{n}": part for n, part in enumerate(parts)}
    return out | ({"motion": result.motion[None]} if motion else {"latents": whole})


@meta_runner("gen_infer")
def run_script(case: Case) -> dict[str, Any]:
    """The released inference script, from latents to latents."""
    i, c, kw = case.inputs, case.config, case.meta["args"]["kw"]
    size, delay, compat = c["patch_size"], c["delay"], SCRIPT
    stats = MotionStats(i["motion_mean"], i["motion_std"])
    motion = stats.normalise(i["motion_raw"]).bfloat16().float()
    frames = compat.prefix_frames(kw["gt_prefix_seconds"], len(motion), size)
    prefix = frames // size + delay
    whole = i["speech_latent"][0]
    reference = max(-(-len(whole) // size), len(motion) // size + delay)
    request = Request(
        i["text_ids"].tolist(),
        i["speaker_emb"][0],
        whole[: prefix * size],
        motion[:frames],
        motion[0],
        prefix,
        compat.limit(reference, prefix, delay),
    )
    out, result = run_loop(case, request, MODES["t2av"], compat)
    kept = len(motion) // size * size
    return out | {
        "speech": result.speech,
        "decoded_0": torch.cat([request.speech, result.speech])[None],
        "motion_raw": torch.cat([i["motion_raw"][:frames], stats.restore(result.motion)]),
        "gt_raw": i["motion_raw"][:kept],
        "placeholder_len": torch.tensor(max(-(-len(whole) // size), len(motion) // size + STALE_DELAY)),
    }
