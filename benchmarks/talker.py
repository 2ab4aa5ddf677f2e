"""Talker-T2AV: training against a loop over rows, generation against a loop structured as in the official program.

training: a forward and backward pass of the batched training forward and of a loop over rows and patches
(benchmarks/plain_talker.py), in turns on the same batches and random draws; the losses must agree. Half of the rows are
T2AV, lengths are between `--shortest` and `--longest`. Times are CPU times, which other programs disturb less.

generation: T2AV with random weights, timed by part, and against a loop structured as in the official program
(benchmarks/official_talker.py), whose latents must agree; a row of a batch against that loop; the codecs, with LIA-X
over several frames at once and frame by frame. Each size runs in a separate process. At most `--patches` patches are
computed, and times are scaled to `--seconds`; of several repeats the fastest counts.

Axes: T frames, S picture side; else those of talker_t2av/losses.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import in_own_process, peak_memory_mb, processor_time, read_config
from benchmarks.official_talker import official_t2av
from benchmarks.plain_talker import plain_losses
from engine.errors import UserError
from lia_x import LiaX, LiaXConfig
from talker_t2av.flow_matching import FlowDraws
from talker_t2av.generation import PatchLoop, generate
from talker_t2av.losses import TalkerBatch, training_forward, training_losses
from talker_t2av.model import FPS, TalkerConfig, TalkerT2AV
from talker_t2av.request import MODES, Request, Sampling
from whisperx_vae import WhisperXVAE, WhisperXVAEConfig

PROMPT, TAIL = 10, 1  # tokens before and after the placeholders
AGREE = 1e-4  # relative
MEASURED = ("training", "generation")
LEAST = {"batch": 1, "repeats": 1, "shortest": 0.4, "steps": 1, "patches": 1, "rows": 1, "seconds": 0.2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(threads=1)
    parser.add_argument(
        "measured", nargs="*", default=list(MEASURED), metavar="training|generation", help="what to measure"
    )
    parser.add_argument("--models", nargs="+", choices=("tiny", "base"), default=["tiny", "base"], help="model sizes")
    parser.add_argument("--repeats", type=int, help="repeats of each timing (None: 5 for training, 1 for generation)")
    training = parser.add_argument_group("training")
    training.add_argument("--batch", type=int, default=8, help="rows of a batch")
    training.add_argument("--shortest", type=float, default=1.6, help="seconds of the shortest row")
    training.add_argument("--longest", type=float, default=3.2, help="seconds of the longest row")
    generation = parser.add_argument_group("generation")
    generation.add_argument("--seconds", type=float, default=5.0, help="seconds of speech")
    generation.add_argument("--steps", type=int, default=10, help="steps of the flow solver")
    generation.add_argument("--guidance", nargs="+", type=float, default=[2.0, 1.0], help="guidance scales")
    generation.add_argument("--patches", type=int, help="largest number of patches (None: all for tiny, 4 for base)")
    generation.add_argument("--rows", type=int, default=8, help="rows of the batch")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    unknown = [name for name in args.measured if name not in MEASURED]
    if unknown or args.longest < args.shortest or args.seconds > 30:
        raise UserError("give training or generation, --longest of at least --shortest, and --seconds of at most 30")
    for model in args.models:
        job = vars(args) | {"model": model}
        if "training" in args.measured:
            r = in_own_process(measure_training, job)
            times = r["seconds_a_step"]
            yield r, f"{model}: {times['batched']:.3f} s a step, baseline {times['plain']:.3f} s ({r['ratio']:.2f}x)"
        if "generation" in args.measured:
            yield from run_generation(job, few=model != "tiny")


def run_generation(job: dict[str, Any], few: bool) -> Iterator[tuple[dict[str, Any], str]]:
    """One size; of the larger one only a `few` patches and frames are computed."""
    job["patches"] = job["patches"] or (4 if few else 10**6)
    job |= {"decoded": 25 if few else 10**6, "rendered": 2 if few else 64}
    r = in_own_process(measure_generation, job)
    r["pictures"] = in_own_process(measure_pictures, job)
    loop, sound = r[f"guidance_{job['guidance'][0]:g}"]["s_a_patch"], r["decode_s_a_patch"]
    picture, patch = r["pictures"]["render_s_a_frame"], r["s_of_a_patch"]
    r["real_time_factor"] = {
        "speech_and_motion": loop / patch,
        "with_sound": (loop + sound) / patch,
        "with_pictures": (loop + sound) / patch + picture * FPS,
    }
    ratios = ", ".join(
        f"{r[f'guidance_{g:g}']['speed_up']:.2f}x alone, {r[f'guidance_{g:g}']['speed_up_of_a_row']:.2f}x a row of "
        f"{job['rows']} at guidance {g:g}"
        for g in job["guidance"]
    )
    line = (
        f"{job['model']}: real-time factor {r['real_time_factor']['speech_and_motion']:.2f} "
        f"({r['real_time_factor']['with_pictures']:.2f} with sound and pictures), against the official shape {ratios}, "
        f"first sound after {r['first_sound_s']:.2f} s ({r['patches_before_first_sound']} patches), "
        f"{r['peak_memory_mb']:.0f} MB"
    )
    yield r, line


def build(name: str) -> TalkerT2AV:
    """configs/model/talker_t2av_NAME.yaml with random weights: speed does not depend on them."""
    return TalkerT2AV(TalkerConfig(**read_config(f"model/talker_t2av_{name}")))


def random_batch(model: TalkerT2AV, rows: int, shortest: float, longest: float) -> TalkerBatch:
    """`rows` rows between so many seconds, every second one T2AV."""
    c = model.config
    frames = torch.linspace(FPS * shortest, FPS * longest, rows).long()
    slots = -(-frames // c.patch_size)
    motion = torch.where(torch.arange(rows) % 2 == 0, frames // c.patch_size * c.patch_size, 0)
    lengths, total = PROMPT + slots + TAIL, int(PROMPT + slots.max() + TAIL)
    return TalkerBatch(
        input_ids=torch.randint(0, c.llm["vocab_size"], (rows, total)),
        attention_mask=(torch.arange(total) < lengths[:, None]).long(),
        speech_span=torch.stack([torch.full_like(slots, PROMPT), PROMPT + slots], 1),
        speech=torch.randn(rows, int(frames.max()), c.speech_dim),
        speech_frames=frames,
        motion=torch.randn(rows, int(motion.max()), c.motion_dim),
        motion_frames=motion,
        speaker=torch.randn(rows, c.speaker_dim),
    )


def measure_training(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step, batched and of the baseline, and their ratio."""
    model = build(job["model"]).train()
    batch = random_batch(model, job["batch"], job["shortest"], job["longest"])
    with torch.no_grad():
        examples = training_forward(model, batch)
    draws = {name: FlowDraws.sample(getattr(examples, name).x1) for name in ("speech", "motion")}
    ways: dict[str, Callable[[], dict[str, Tensor]]] = {
        "batched": lambda: training_losses(model, training_forward(model, batch), **draws),
        "plain": lambda: plain_losses(model, batch, **draws),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses = {}
    for repeat in range((job["repeats"] or 5) + 1):
        for name, way in ways.items():

            def step(way: Callable = way) -> Tensor:
                loss = way()["loss"]
                loss.backward()
                return loss.detach()

            loss, elapsed = processor_time(step)
            if repeat:  # the first one warms up
                seconds[name].append(elapsed)
            model.zero_grad()
            losses[name] = float(loss)
    if abs(losses["batched"] - losses["plain"]) > AGREE * abs(losses["plain"]):
        raise UserError(f"the losses differ: {losses['batched']} batched, {losses['plain']} plain")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "model": job["model"],
        "seconds_a_step": medians,
        "ratio": medians["plain"] / medians["batched"],
        "examples": {name: len(value.x1) for name, value in (("speech", examples.speech), ("motion", examples.motion))},
        "losses": losses,
    }


PARTS = {  # part: module, method
    "backbone": ("", "backbone"),
    "speech head": ("speech_cfm", "sample"),
    "motion head": ("motion_cfm", "sample"),
    "speech encoder": ("", "speech_tokens"),
    "motion encoder": ("", "motion_tokens"),
}


class Parts:
    """Processor time inside some calls of a model."""

    def __init__(self, model: TalkerT2AV) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        for part, (owner, name) in PARTS.items():
            module = model.get_submodule(owner)
            setattr(module, name, self._timed(part, getattr(module, name)))

    def _timed(self, part: str, call: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            result = call(*args, **kwargs)
            self.seconds[part] += time.process_time() - begin
            return result

        return timed


def random_request(model: TalkerT2AV, patches: int, seed: int = 0, prompt: int = 2 * PROMPT) -> Request:
    c, g = model.config, torch.Generator().manual_seed(seed)
    return Request(
        prompt=torch.randint(0, c.llm["vocab_size"], (prompt,), generator=g).tolist(),
        speaker=torch.randn(c.speaker_dim, generator=g),
        speech=torch.zeros(0, c.speech_dim),
        motion=torch.zeros(0, c.motion_dim),
        first_motion=torch.randn(c.motion_dim, generator=g),
        max_patches=patches,
        seed=seed,
    )


@torch.no_grad()
def measure_generation(job: dict[str, Any]) -> dict[str, Any]:
    """One size: times by part, against the official shape, batches, codecs, first sound, peak memory."""
    model = build(job["model"]).eval()
    model.head_stop.proj.bias.fill_(9.0)  # a stop head that is asked and always says no
    model.head_stop.head.weight.fill_(-1.0)
    size, mode = model.config.patch_size, MODES["t2av"]
    whole = -(-round(job["seconds"] * FPS) // size)
    patches = min(whole, job["patches"])
    request = random_request(model, patches)
    result: dict[str, Any] = {k: job[k] for k in ("model", "seconds", "steps")} | {"timed_patches": patches}
    result["s_of_a_patch"] = size / FPS
    result["parameters"] = sum(p.numel() for p in model.parameters())
    generate(model, [random_request(model, 1)], mode, Sampling(job["steps"]))  # warm up
    _, prefill = processor_time(lambda: PatchLoop(model, [request], mode, Sampling(1, 0.3, 1.0)))
    result["prefill_s"] = prefill
    rows = [random_request(model, patches, seed, 2 * PROMPT + seed) for seed in range(job["rows"])]
    for guidance in job["guidance"]:
        sampling = Sampling(job["steps"], guidance=guidance)
        result[f"guidance_{guidance:g}"] = compare_loops(model, request, rows, sampling, job["repeats"] or 1)
    sampling = Sampling(job["steps"], guidance=job["guidance"][0])
    parts = Parts(model)
    _, total = processor_time(lambda: generate(model, [request], mode, sampling))
    by_part = {f"{name}_s_a_patch": seconds / patches for name, seconds in parts.seconds.items()}
    result["parts"] = by_part | {"rest_s_a_patch": (total - sum(parts.seconds.values())) / patches}
    result |= measure_sound(job, model, sampling, whole)
    result["peak_memory_mb"] = peak_memory_mb()
    return result


def compare_loops(
    model: TalkerT2AV, request: Request, rows: list[Request], sampling: Sampling, repeats: int
) -> dict[str, float]:
    """Seconds of a patch, and how far results differ: our loop, that of the official shape, ours with several rows."""
    mode, patches = MODES["t2av"], request.max_patches
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: generate(model, [request], mode, sampling)[0],
        "official_shape": lambda: official_t2av(model, request, sampling),
        "batch": lambda: generate(model, rows, mode, sampling)[0],
    }
    done, seconds = {}, {way: [] for way in ways}
    for _ in range(repeats):
        for way, call in ways.items():
            done[way], spent = processor_time(call)
            seconds[way].append(spent / patches)
    times = {way: min(spent) for way, spent in seconds.items()}
    times["batch"] /= len(rows)
    ours, (speech, motion), of_batch = done.values()
    return {
        "s_a_patch": times["ours"],
        "official_shape_s_a_patch": times["official_shape"],
        "speed_up": times["official_shape"] / times["ours"],
        "rows": len(rows),
        "batch_s_a_patch_of_a_row": times["batch"],
        "speed_up_of_a_row": times["official_shape"] / times["batch"],
        "latents_differ_by": max(_difference(ours.speech, speech), _difference(ours.motion, motion)),
        "batch_differs_by": max(_difference(getattr(ours, s), getattr(of_batch, s)) for s in ("speech", "motion")),
        "largest_latent": float(max(speech.abs().max(), motion.abs().max())),
    }


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def measure_sound(job: dict[str, Any], model: TalkerT2AV, sampling: Sampling, whole: int) -> dict[str, Any]:
    """The sound decoder of the same size, with random weights, and the time to the first sound."""
    c = model.config
    with torch.device("meta"):  # its encoder and Whisper stay there
        vae = WhisperXVAE(WhisperXVAEConfig(**read_config(f"codec/whisperx_vae_{job['model']}"))).eval()
    vae.out_proj.to_empty(device="cpu"), vae.decoder.to_empty(device="cpu")
    for parameter in [*vae.out_proj.parameters(), *vae.decoder.parameters()]:
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    frames = min(whole * c.patch_size, job["decoded"])
    _, decode = processor_time(lambda: vae.decode(torch.randn(1, frames, c.speech_dim)))
    before: list[int] = []

    def latents() -> Iterator[Tensor]:
        for step in PatchLoop(model, [random_request(model, whole)], MODES["t2av"], sampling):
            before.append(step.index)
            yield step.speech

    _, first = processor_time(lambda: next(iter(vae.decode_stream(latents()))))
    return {
        "decode_s_a_patch": decode / frames * c.patch_size,
        "first_sound_s": first,
        "patches_before_first_sound": len(before),
    }


@torch.no_grad()
def measure_pictures(job: dict[str, Any]) -> dict[str, Any]:
    """LIA-X of the same size, with random weights: several frames at once, and one by one."""
    lia = LiaX(LiaXConfig(**read_config(f"codec/lia_x_{job['model']}"))).eval()
    side, count = lia.config.size, job["rendered"]
    identity = lia.identity(torch.rand(3, side, side) * 2 - 1)
    codes = 0.1 * torch.randn(count, lia.config.motion_dim)
    if count > 2:  # to warm up; at full size one frame takes long enough
        lia.decode(codes[:1], identity)
    _, batched = processor_time(lambda: lia.decode(codes, identity))
    _, single = processor_time(lambda: lia.decode(codes, identity, chunk=1))
    return {
        "render_s_a_frame": batched / count,
        "frames_a_second": count / batched,
        "frames_a_second_one_by_one": count / single,
        "peak_memory_mb": peak_memory_mb(),
    }
