"""Runners for Talker-T2AV's training samples (`dataset`) and its generation (`gen_*`), chosen by `meta["runner"]`.

Axes: B batch, T tokens, F speech frames, Fm motion frames, P frames of a patch, S steps, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F

from engine.nn.mel import RATE, log_mel, pad_or_trim
from talker_t2av import official
from talker_t2av.data import SequenceFormat, collate, last_window_start
from talker_t2av.generation import BatchedDecoder, Result
from talker_t2av.model import HOP, HOP16, TalkerT2AV
from talker_t2av.prompt import step_limit
from talker_t2av.request import MODES, Mode, Request, Sampling
from talker_t2av.system import MotionStats
from tests.golden.runners import Case, runner
from tests.golden.runners.talker import talker
from tests.reference.official_dataset import cut_recording, repeated

WINDOW = 30 * RATE
STALE_DELAY = 5  # the script counts its placeholders with its own constant; only the first one matters


@runner("dataset")
def run_dataset(case: Case) -> dict[str, Any]:
    args = case.meta["args"]
    i = case.inputs
    format = SequenceFormat(
        args["speech_token_id"], i["tail_ids"].tolist(), args["patch_size"], args["delay"], args["model_max_length"]
    )
    stats = MotionStats(i["motion_mean"], i["motion_std"])
    out: dict[str, Any] = {}
    items = []
    tasks = {"t2sv": [], "tts": []}
    for n, item in enumerate(args["items"]):
        tasks[item["task"]].append(item)
        raw = i.get(f"motion_raw.{n}", torch.zeros(0, len(stats.mean)))
        ramp = torch.arange(item["n24"], dtype=torch.float32)
        recording = cut_recording(ramp, ramp[: 2 * len(ramp) // 3], stats.normalise(raw), item["start"])
        sample = format.example(
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
            "crop_range_hi": torch.tensor(last_window_start(len(raw))),
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


@torch.no_grad()
def run_loop(case: Case, model: TalkerT2AV, mode: Mode, request: Request) -> tuple[dict[str, Any], Result]:
    """The loop's outputs that all routines have in common, and the new frames."""
    kw = case.meta["args"]["kw"]
    count = step_limit(model, request, mode)
    sampling = Sampling(kw["cfm_steps"], kw["cfm_temperature"], kw["cfm_cfg"])
    use_stop = kw.get("use_stop", case.meta["args"].get("use_stop", False))
    noise = {stream: case.inputs.get(f"noise_{stream}") for stream in ("speech", "motion")}
    noise = {  # a case has as much as its program drew
        stream: F.pad(z, (0, 0) * 3 + (0, count - len(z))) for stream, z in noise.items() if z is not None
    }
    noise = {stream: z[:, 0] for stream, z in noise.items()}
    decoder = BatchedDecoder(model, mode, sampling, use_stop=use_stop)
    row = decoder.join(request, noise)
    hidden = []
    steps = []
    while decoder.active:
        hidden.append(decoder.state.hidden.clone())
        decoder.step()
        steps.append(decoder.patch)
    stops = [step.stop for step in steps[request.rules.first_test - 1 : -1] if step.stop is not None]
    if row.end < row.limit:
        stops.append(steps[-1].stop)
    out = {
        "prefill_embeds": row.prompt[None],
        "step_tokens": torch.cat([step.token for step in steps]),
        "h": torch.cat([*hidden, decoder.state.hidden]),
        "stop_prob": torch.cat(stops) if stops else torch.zeros(0),
        "n_steps": torch.tensor(len(steps)),
        "n_motion_steps": torch.tensor(sum(step.motion is not None for step in steps)),
    }
    return out, decoder.result(row)


@runner("gen_speech", "gen_speech_motion")
def run_method(case: Case) -> dict[str, Any]:
    """The library's two methods: with and without motion."""
    i = case.inputs
    model = talker(case)
    seconds = case.meta["args"]["kw"]["prefix_seconds"]
    reference = int(i["mel_len"][0])
    speaker = i["speaker_emb"][0]
    prompt = i["input_ids"][0, : int(i["speech_span"][0, 0])].tolist()
    moving = case.meta["runner"] == "gen_speech_motion"
    frames = official.prefix_frames(seconds, reference, model.config.patch_size if moving else 1)
    speech = i["speech_latent"][0, :frames]
    first = i["first_motion"] if moving else None
    request = official.library_method(model.config, prompt, speaker, speech, reference, first)
    out, result = run_loop(case, model, MODES["t2av" if moving else "tts"], request)
    whole = torch.cat([speech, result.speech])[None]
    parts = [whole, speech[None], result.speech[None]] if frames else [whole, result.speech[None]]
    out |= {f"decoded_{n}": part for n, part in enumerate(parts)}
    out |= {
        "codec_audio_shape": torch.tensor([1, 1, HOP * max(1, frames)]),  # without a prefix, a frame of no use
        "spk_audio_shape": torch.tensor([1, HOP16 * official.voice_frames(frames)]),
    }
    return out | ({"motion": result.motion[None]} if moving else {"latents": whole})


@runner("gen_infer")
def run_script(case: Case) -> dict[str, Any]:
    """The released inference script, from latents to latents."""
    i = case.inputs
    model = talker(case)
    size = model.config.patch_size
    stats = MotionStats(i["motion_mean"], i["motion_std"])
    motion = i["motion_raw"]
    seconds = case.meta["args"]["kw"]["gt_prefix_seconds"]
    speech = i["speech_latent"][0]
    prompt = i["text_ids"].tolist()
    speaker = i["speaker_emb"][0]
    request = official.inference_script(model.config, stats, prompt, speaker, speech, motion, seconds)
    out, result = run_loop(case, model, MODES["t2av"], request)
    for name in ("codec_audio_shape", "spk_audio_shape"):
        case.skip(name, "the whole reference is encoded, before generation")
    return out | {
        "speech": result.speech,
        "decoded_0": torch.cat([request.speech, result.speech])[None],
        "motion_raw": torch.cat([motion[: len(request.motion)], stats.restore(result.motion)]),
        "gt_raw": motion[: len(motion) // size * size],
        "placeholder_len": torch.tensor(max(-(-len(speech) // size), len(motion) // size + STALE_DELAY)),
    }
