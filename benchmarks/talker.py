"""Measure Talker-T2AV: training against a loop over rows, generation against a loop of the official program's shape.

    python -m benchmarks.talker training              # tiny, batches of 8, one thread
    python -m benchmarks.talker generation            # tiny and base, T2AV of 5 s, one thread

training: a forward and backward pass of the batched training forward and of the loop over rows and patches
(benchmarks/plain_talker.py), on the same batches and draws, in turn; the losses must agree. Half of the rows are T2AV,
lengths are drawn between `--shortest` and `--longest`. Times are processor time, which other programs disturb less.

generation: T2AV with random weights, by parts, and against a loop of the official program's shape
(benchmarks/official_talker.py), whose latents are compared; a row of a batch against that loop; the codecs, with LIA-X
over several frames at once and frame by frame. Each size runs in a process of its own, so that peak memory is its own.
At most `--patches` patches are computed, and times scale to `--seconds`; of several repeats the fastest counts.

Axes: T frames, S picture side; else those of talker_t2av/losses.py.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks.official_talker import official_t2av
from benchmarks.plain_talker import plain_losses
from benchmarks.record import write_record
from engine.config import CONFIGS
from engine.errors import UserError, run_cli
from lia_x import LiaX, LiaXConfig
from talker_t2av.flow_matching import FlowDraws
from talker_t2av.generation import PatchLoop, generate
from talker_t2av.losses import TalkerBatch, training_forward, training_losses
from talker_t2av.model import FPS, TalkerConfig, TalkerT2AV
from talker_t2av.request import MODES, Request, Sampling
from whisperx_vae import WhisperXVAE, WhisperXVAEConfig

T = TypeVar("T")

PROMPT, TAIL = 10, 1  # tokens before and after the placeholders
AGREE = 1e-4  # relative


def build(name: str) -> TalkerT2AV:
    """configs/model/talker_t2av_NAME.yaml with random weights: speed does not depend on them."""
    path = CONFIGS / "model" / f"talker_t2av_{name}.yaml"
    if not path.is_file():
        raise UserError(f"--model {name} is unknown: there is no {path}")
    torch.manual_seed(0)
    return TalkerT2AV(TalkerConfig(**OmegaConf.to_container(OmegaConf.load(path))))


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


def measure_training(args: argparse.Namespace) -> dict:
    """Seconds of a step, batched and plain, and their ratio."""
    model = build(args.model).train()
    batch = random_batch(model, args.batch, args.shortest, args.longest)
    with torch.no_grad():
        examples = training_forward(model, batch)
    draws = {name: FlowDraws.sample(getattr(examples, name).x1) for name in ("speech", "motion")}
    ways: dict[str, Callable[[], dict[str, Tensor]]] = {
        "batched": lambda: training_losses(model, training_forward(model, batch), **draws),
        "plain": lambda: plain_losses(model, batch, **draws),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses = {}
    for repeat in range(args.repeats + 1):
        for name, way in ways.items():
            begin = time.process_time()
            loss = way()["loss"]
            loss.backward()
            if repeat:  # the first one warms up
                seconds[name].append(time.process_time() - begin)
            model.zero_grad()
            losses[name] = float(loss.detach())
    if abs(losses["batched"] - losses["plain"]) > AGREE * abs(losses["plain"]):
        raise UserError(f"the losses differ: {losses['batched']} batched, {losses['plain']} plain")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
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


def clocked(call: Callable[[], T]) -> tuple[T, float]:
    """The result and the processor time of a call."""
    begin = time.process_time()
    result = call()
    return result, time.process_time() - begin


@torch.no_grad()
def measure_generation(job: dict[str, Any]) -> dict[str, Any]:
    """One size: times by part, against the official shape, batches, codecs, first sound, peak memory."""
    torch.set_num_threads(job["threads"])
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
    _, prefill = clocked(lambda: PatchLoop(model, [request], mode, Sampling(1, 0.3, 1.0)))
    result["prefill_s"] = prefill
    rows = [random_request(model, patches, seed, 2 * PROMPT + seed) for seed in range(job["rows"])]
    for guidance in job["guidance"]:
        sampling = Sampling(job["steps"], guidance=guidance)
        ways = {
            "ours": lambda: generate(model, [request], mode, sampling)[0],  # noqa: B023
            "official_shape": lambda: official_t2av(model, request, sampling),  # noqa: B023
            "batch": lambda: generate(model, rows, mode, sampling)[0],  # noqa: B023
        }
        done, seconds = {}, {way: [] for way in ways}
        for _ in range(job["repeats"]):
            for way, call in ways.items():
                done[way], spent = clocked(call)
                seconds[way].append(spent / patches)
        times = {way: min(spent) for way, spent in seconds.items()}
        times["batch"] /= len(rows)
        ours, (speech, motion), of_batch = done.values()
        result[f"guidance_{guidance:g}"] = {
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
    sampling = Sampling(job["steps"], guidance=job["guidance"][0])
    parts = Parts(model)
    _, total = clocked(lambda: generate(model, [request], mode, sampling))
    by_part = {f"{name}_s_a_patch": seconds / patches for name, seconds in parts.seconds.items()}
    result["parts"] = by_part | {"rest_s_a_patch": (total - sum(parts.seconds.values())) / patches}
    result |= measure_sound(job, model, sampling, whole)
    result["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def codec_config(codec: str, size: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / "codec" / f"{codec}_{size}.yaml"))


def measure_sound(job: dict[str, Any], model: TalkerT2AV, sampling: Sampling, whole: int) -> dict[str, Any]:
    """The sound decoder of the same size, with random weights, and the time to the first sound."""
    c = model.config
    with torch.device("meta"):  # its encoder and Whisper stay there
        vae = WhisperXVAE(WhisperXVAEConfig(**codec_config("whisperx_vae", job["model"]))).eval()
    vae.out_proj.to_empty(device="cpu"), vae.decoder.to_empty(device="cpu")
    for parameter in [*vae.out_proj.parameters(), *vae.decoder.parameters()]:
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    frames = min(whole * c.patch_size, job["decoded"])
    _, decode = clocked(lambda: vae.decode(torch.randn(1, frames, c.speech_dim)))
    before: list[int] = []

    def latents() -> Iterator[Tensor]:
        for step in PatchLoop(model, [random_request(model, whole)], MODES["t2av"], sampling):
            before.append(step.index)
            yield step.speech

    _, first = clocked(lambda: next(iter(vae.decode_stream(latents()))))
    return {
        "decode_s_a_patch": decode / frames * c.patch_size,
        "first_sound_s": first,
        "patches_before_first_sound": len(before),
    }


@torch.no_grad()
def measure_pictures(job: dict[str, Any]) -> dict[str, Any]:
    """LIA-X of the same size, with random weights: several frames at once, and one by one."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    lia = LiaX(LiaXConfig(**codec_config("lia_x", job["model"]))).eval()
    side, count = lia.config.size, job["rendered"]
    identity = lia.identity(torch.rand(3, side, side) * 2 - 1)
    codes = 0.1 * torch.randn(count, lia.config.motion_dim)
    if count > 2:  # to warm up; at full size one frame takes long enough
        lia.decode(codes[:1], identity)
    _, batched = clocked(lambda: lia.decode(codes, identity))
    _, single = clocked(lambda: lia.decode(codes, identity, chunk=1))
    return {
        "render_s_a_frame": batched / count,
        "frames_a_second": count / batched,
        "frames_a_second_one_by_one": count / single,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def alone(call: Callable[[dict[str, Any]], dict[str, Any]], job: dict[str, Any]) -> dict[str, Any]:
    """The result of a call in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(call, job).result()
        except BrokenProcessPool as error:
            raise UserError(f"--models {job['model']}: the process was killed, as for want of memory") from error


def run_generation(args: argparse.Namespace) -> None:
    what = "Talker-T2AV generation (T2AV, random weights): processor time by part, and against the official shape"
    for model in args.models:
        job = {k: getattr(args, k) for k in ("threads", "seconds", "steps", "guidance", "rows", "repeats")}
        job["model"] = model
        few = model != "tiny"
        job["patches"] = args.patches or (4 if few else 10**6)
        job |= {"decoded": 25 if few else 10**6, "rendered": 2 if few else 64}
        r = alone(measure_generation, job)
        r["pictures"] = alone(measure_pictures, job)
        loop, sound = r[f"guidance_{args.guidance[0]:g}"]["s_a_patch"], r["decode_s_a_patch"]
        picture, patch = r["pictures"]["render_s_a_frame"], r["s_of_a_patch"]
        r["real_time_factor"] = {
            "speech_and_motion": loop / patch,
            "with_sound": (loop + sound) / patch,
            "with_pictures": (loop + sound) / patch + picture * FPS,
        }
        ratios = ", ".join(
            f"{r[f'guidance_{g:g}']['speed_up']:.2f}x alone, {r[f'guidance_{g:g}']['speed_up_of_a_row']:.2f}x a row of "
            f"{args.rows} at guidance {g:g}"
            for g in args.guidance
        )
        print(
            f"{model}: real-time factor {r['real_time_factor']['speech_and_motion']:.2f} "
            f"({r['real_time_factor']['with_pictures']:.2f} with sound and pictures), official shape {ratios}, "
            f"first sound after {r['first_sound_s']:.2f} s ({r['patches_before_first_sound']} patches), "
            f"{r['peak_memory_mb']:.0f} MB",
            flush=True,
        )
        settings = {name: value for name, value in vars(args).items() if name not in ("out", "models")}
        print(write_record(args.out, f"talker-generation-{model}", what, r, arguments=settings), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("training", help="a training step, batched against row by row")
    training.add_argument("--model", default="tiny", help="tiny or base (default: %(default)s)")
    training.add_argument("--batch", type=int, default=8, help="rows (default: %(default)s)")
    training.add_argument("--shortest", type=float, default=1.6, help="seconds (default: %(default)s)")
    training.add_argument("--longest", type=float, default=3.2, help="seconds (default: %(default)s)")
    training.add_argument("--repeats", type=int, default=5, help="timed steps of each (default: %(default)s)")
    generation = commands.add_parser("generation", help="T2AV by parts, and against the official program's shape")
    generation.add_argument("--models", nargs="+", default=["tiny", "base"], help="default: tiny base")
    generation.add_argument("--seconds", type=float, default=5.0, help="of speech (default: %(default)s)")
    generation.add_argument("--steps", type=int, default=10, help="of the flow solver (default: %(default)s)")
    generation.add_argument("--guidance", nargs="+", type=float, default=[2.0, 1.0], help="scales (default: 2 1)")
    generation.add_argument("--patches", type=int, help="to compute at most (default: all; 4 of larger models)")
    generation.add_argument("--rows", type=int, default=8, help="of the batch (default: %(default)s)")
    generation.add_argument("--repeats", type=int, default=1, help="of each timing (default: %(default)s)")
    for command in (training, generation):
        command.add_argument("--threads", type=int, default=1, help="default: %(default)s")
        command.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the record")
    args = parser.parse_args()
    if args.command == "generation":
        counts = (args.steps, args.rows, args.patches or 1, args.threads, args.repeats)
        if min(counts) < 1 or not 0.2 <= args.seconds <= 30:
            raise UserError("--steps, --patches, --rows, --threads, --repeats: 1 or more; --seconds: in 0.2..30")
        run_generation(args)
        return
    if args.batch < 1 or args.repeats < 1 or not 0.4 <= args.shortest <= args.longest:
        raise UserError("--batch and --repeats must be 1 or more, and --shortest from 0.4 to --longest")
    torch.set_num_threads(args.threads)
    results = measure_training(args)
    times = results["seconds_a_step"]
    print(f"{args.model}, batch {args.batch}: {times['batched']:.3f} s a step, plain {times['plain']:.3f} s")
    print(f"ratio {results['ratio']:.2f}")
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    what = "Talker-T2AV training step (forward and backward): batched against the loop over rows and patches"
    path = write_record(args.out, f"talker-training-{args.model}", what, results, arguments=settings)
    print(path)


if __name__ == "__main__":
    run_cli(main)
