"""GPU checks by name, which scripts/check_gpu.py runs.

The range of a result is derived from the data sheet of the GPU, or from the operations of a call, which `Operators`
counts and `Machine.bounds` converts to seconds.

Axes: B clips, K token levels, L token frames, N codes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from torch import Tensor

from benchmarks import common, serving, training
from benchmarks.inference import CLIP, GUIDANCE, build_hicodit, build_talker, random_conditions, random_request
from benchmarks.plan import EFFICIENCY, Card, find_card, measure_samples, plan, read_recipe
from engine.cuda_graph import CudaGraphs, GraphedSteps
from engine.errors import UserError, printable
from engine.files import CHECKOUT
from engine.precision import convert_matrices
from hicodit.conditions.types import Conditions, num_expression_windows
from hicodit.generation import generate
from hicodit.guidance import guided_posterior
from hicodit.layers import attend
from hicodit.model import FLOAT32_MODULES, TOKENS_PER_FRAME, HiCoDiT
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import BUNDLED as HICODIT
from hicodit.settings import SamplerConfig, with_preset
from hicodit.system import HiCoDiTSystem
from lia_x.codec import LiaX, LiaXConfig
from talker_t2av.fused import fuse_layers
from talker_t2av.generation import BatchedDecoder, Result
from talker_t2av.request import MODES, Sampling
from talker_t2av.system import BUNDLED, TalkerSystem
from whisperx_vae.codec import WhisperXVAE, WhisperXVAEConfig

# A loop at batch size 1 takes LEAST to MOST times the roofline estimate, and up to STARTED times the kernel launch
# time.
LEAST = 1.5
MOST = 6.0
STARTED = 3.0
REPLAYED = 2e-6  # assumed minimum time of a small kernel in a CUDA graph in seconds
MIB = 2**20
# Seconds of HiCoDiT's clip, patches of Talker-T2AV, seconds and most samples of a training step, number of steps.
SCALE = {"base": (10.0, 25, 8.0, 64, 10), "tiny": (1.0, 3, 0.4, 2, 2)}
TWO_GPUS = "two_gpus or killed_rank"  # of tests/gpu/test_cards.py
LINKED = 0.6  # fraction of the link rate that collectives must reach
PATIENCE = 900  # seconds for the tests
DRIFT = 1e-3  # tolerance of latents with CUDA graphs
DIVERGENCE = 0.004  # tolerance of the KL divergence of bfloat16
DIFFERENCE = 0.02  # tolerance of flash-attn


@dataclass(frozen=True)
class Line:
    """Result of a check. A value from `low` to `high` is a PASS; a bound of None is not checked."""

    name: str
    verdict: str
    value: float | None = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.verdict}  {self.name}"
        if self.value is not None:
            text += f": {self.value:.4g}{f' {self.unit}' if self.unit else ''}"
        if self.low is not None or self.high is not None:
            ends = ("" if end is None else f"{end:.4g}" for end in (self.low, self.high))
            text += f" [{' to '.join(ends).strip()}]"
        return f"{text}; {self.note}" if self.note else text


def judge(value: float, low: float | None = None, high: float | None = None) -> str:
    """Return PASS for a value within the range, WARN within a factor of two of it, else FAIL."""
    least = -math.inf if low is None else low
    most = math.inf if high is None else high
    if not math.isfinite(value) or 2 * value < least or value > 2 * most:
        return "FAIL"
    return "PASS" if least <= value <= most else "WARN"


def line(name: str, value: float, unit: str, low: float | None, high: float | None, note: str = "") -> Line:
    """Return the result line of a value, classified by its range."""
    return Line(name, judge(value, low, high), value, unit, low, high, note)


class Rates(NamedTuple):
    """Measured rates: matrix products in FLOP/s, and copies in bytes/s, counting bytes read and written."""

    bf16: float
    fp32: float
    copy: float


class Machine:
    """The GPU under test and its measurements.

    Tests substitute a machine that runs all checks on a CPU.

    Args:
        device: a CUDA device.
        gpus: number of GPUs that take part.
        size: size of the models: base, or tiny for a test.

    Attributes:
        backend: backend of CUDA graphs. None: `engine.cuda_graph.CudaGraphs`.
        tests: folder of the GPU tests.
    """

    backend: CudaGraphs | None = None
    tests: Path = CHECKOUT / "tests" / "gpu"

    def __init__(self, device: torch.device, gpus: int = 1, size: str = "base") -> None:
        self.device = device
        self.gpus = gpus
        self.size = size
        self.seconds, self.patches, self.step_seconds, self.samples, self.steps = SCALE[size]

    @cached_property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    @property
    def card(self) -> Card | None:
        """Specifications of the GPU; None if unknown."""
        return find_card(self.name)

    @cached_property
    def stated(self) -> Card:
        """Return the data sheet of the GPU or, for an unknown GPU, values implied by the measured rates."""
        if self.card is not None:
            return self.card
        memory = torch.cuda.get_device_properties(self.device).total_memory
        share = EFFICIENCY["compute"]
        peak = self.rates.bf16 / 1e12 / share
        single = self.rates.fp32 / 1e12 / share
        return Card(peak, single, memory, self.rates.copy / EFFICIENCY["memory"], math.inf, math.inf)

    def versions(self) -> tuple[float, float]:
        """Return the CUDA version supported by the driver, and that of PyTorch, such as 12.8."""
        number = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
        return number.value // 1000 + number.value % 1000 / 100, float(torch.version.cuda or "nan")

    @cached_property
    def rates(self) -> Rates:
        bf16 = common.matrix_rate(self.device, torch.bfloat16)
        fp32 = common.matrix_rate(self.device, torch.float32)
        return Rates(bf16, fp32, common.copy_rate(self.device))

    def time(self, call: Callable[[], Any], repeats: int = 3) -> float:
        """Return the median time of a call in seconds, after an untimed call."""
        durations = []
        for _ in range(repeats + 1):
            begin = common.now(self.device)
            call()
            durations.append(common.now(self.device) - begin)
        return statistics.median(durations[1:])

    def forget_peak(self) -> None:
        """Reset the peak memory statistics."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def in_process(self, measure: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of a call in a separate process, which has the GPU memory for itself."""
        self.forget_peak()
        return common.in_own_process(measure, *arguments)

    def bandwidths(self) -> dict[str, float]:
        """Return the bus bandwidth in bytes/s of each collective between the GPUs."""
        with tempfile.TemporaryDirectory() as scratch:
            result = Path(scratch) / "result.json"
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.gpus}"]
            command = [sys.executable, *launch, "-m", "benchmarks.collectives", "--json", str(result)]
            done = subprocess.run(command, cwd=CHECKOUT, timeout=PATIENCE, capture_output=True, text=True)
            if not result.is_file():
                raise UserError(f"torchrun ended with exit code {done.returncode}: {done.stderr[-200:]}")
            return json.loads(result.read_text())

    def bounds(self, work: common.Operators) -> tuple[float, float, str]:
        """Return the expected time range in seconds of work replayed as CUDA graphs, and its explanation."""
        roofline = work.flops / self.rates.bf16 + work.weights / self.rates.copy
        kernels = work.kernels * REPLAYED
        note = (
            f"{work.flops / 1e12:.3g} TFLOP and {work.weights / 1e9:.3g} GB of weights at the measured rates: "
            f"{1e3 * roofline:.3g} ms; {work.kernels:,} kernels: {1e3 * kernels:.3g} ms; "
            f"range {LEAST:g} to {MOST:g} times the first, or {STARTED:g} times the second where that is more"
        )
        return LEAST * roofline, max(MOST * roofline, STARTED * kernels), note


def versions(machine: Machine) -> Iterator[Line]:
    driver, toolkit = machine.versions()
    verdict = "PASS" if math.isfinite(toolkit) and driver >= int(toolkit) else "FAIL"
    yield Line("driver", verdict, driver, "CUDA", None, None, f"PyTorch {torch.__version__} has CUDA {toolkit:g}")


def rates(machine: Machine) -> Iterator[Line]:
    card = machine.card
    found = machine.rates
    for name, value, stated, unit, share in (
        ("matrix rate bf16", found.bf16 / 1e12, card and card.peak, "TFLOP/s", 0.5),
        ("matrix rate fp32", found.fp32 / 1e12, card and card.single, "TFLOP/s", 0.5),
        ("copy rate", found.copy / 1e9, card and card.bandwidth / 1e9, "GB/s", 0.7),
    ):
        if stated is None:
            yield Line(name, "WARN", value, unit, note=f"no data sheet of {machine.name} in benchmarks/plan.py")
        else:
            note = f"{share:.0%} to 105 % of the data sheet's {stated:g}"
            yield line(name, value, unit, share * stated, 1.05 * stated, note)


def gpu_tests(machine: Machine, name: str = "tests/gpu", expression: str = f"not ({TWO_GPUS})") -> Iterator[Line]:
    """Run tests of tests/gpu, by default all single-GPU tests. Skipped tests count as failed."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", str(machine.tests), f"--junitxml={report}", "-k", expression]
        done = subprocess.run(command, cwd=CHECKOUT, timeout=PATIENCE, capture_output=True, text=True)
        if not report.is_file():
            raise UserError(f"pytest ended with exit code {done.returncode}: {(done.stderr or done.stdout)[-200:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    ways = ("failure", "error", "skipped")
    bad = [case.get("name", "") for case in cases if any(case.find(way) is not None for way in ways)]
    note = f"of {len(cases)}" + (f": {', '.join(bad[:8])}" if bad else "")
    verdict = "FAIL" if bad or not cases else "PASS"
    yield Line(name, verdict, len(bad), "failed or skipped", 0, 0, note)


def two_gpus(machine: Machine) -> Iterator[Line]:
    """Test DDP and FSDP2 over NCCL, and a run that continues after one of its processes was killed."""
    if machine.gpus > 1:
        yield from gpu_tests(machine, "two GPUs", TWO_GPUS)


def collectives(machine: Machine) -> Iterator[Line]:
    """Measure the bus bandwidth of NCCL collectives over all GPUs."""
    if machine.gpus < 2:
        return
    for name, value in machine.bandwidths().items():
        rate = value / 1e9
        if machine.card is None:
            yield Line(name, "WARN", rate, "GB/s", note=f"no data sheet of {machine.name} in benchmarks/plan.py")
            continue
        link = machine.card.link / 1e9
        note = f"bus bandwidth of {machine.gpus} GPUs; {LINKED:.0%} to 120 % of the data sheet's {link:g}"
        yield line(name, rate, "GB/s", LINKED * link, 1.2 * link, note)  # NVLink's switches add up sums themselves


def graphs(machine: Machine) -> Iterator[Line]:
    """Compare steps replayed as CUDA graphs with eager execution, for the bundled models in float32."""
    model, conditions, pipeline = _bundled(machine)
    sampler = replace(pipeline.sampler, steps=4)
    tokens = [
        generate(model, conditions, sampler, pipeline.guidance, [0], graphs=steps)[0]
        for steps in (GraphedSteps(), GraphedSteps(machine.device, backend=machine.backend))
    ]
    note = f"of {tokens[0].numel():,} of the bundled HiCoDiT, graphs against eager"
    yield line("graphs hicodit", int((tokens[0] != tokens[1]).sum()), "tokens differ", 0, 0, note)
    talker = TalkerSystem(BUNDLED, None, machine.device).model
    results = []
    for eager in (True, False):
        decoder = BatchedDecoder(
            talker, MODES["t2av"], Sampling(4, guidance=2.0), use_stop=False, backend=machine.backend
        )
        if eager:
            decoder.run_step.backend = None
        results.append(decoder.generate([random_request(talker, machine.patches, 0)])[0])
    one, two = results
    drift = max(float((getattr(one, s) - getattr(two, s)).abs().max()) for s in ("speech", "motion"))
    yield line("graphs talker_t2av", drift, "", 0, DRIFT, "largest difference of latents of the bundled Talker-T2AV")


def _bundled(machine: Machine) -> tuple[HiCoDiT, Conditions, HiCoDiTPipeline]:
    """Return the bundled HiCoDiT in float32, and the conditions of the demo clip, padded for CUDA graphs."""
    pipeline = HiCoDiTPipeline.from_pretrained(device=machine.device, precision="fp32")
    conditions = pipeline.conditions([pipeline.crops(CLIP)])
    frames = 25 if machine.size == "tiny" else conditions.lip.shape[1] // 25 * 25
    lip = conditions.lip[:, :frames]
    expression = conditions.expression[:, : num_expression_windows(frames)]
    conditions = replace(conditions, lip=lip, expression=expression, frames=torch.tensor([frames]))
    return pipeline.system.model, conditions, pipeline


@torch.inference_mode()
def posteriors(machine: Machine) -> Iterator[Line]:
    """Measure the KL divergence of the bundled HiCoDiT's log posteriors in bfloat16 from those in float32."""
    model, conditions, pipeline = _bundled(machine)
    half = convert_matrices(HiCoDiTSystem.from_pretrained(HICODIT).model, torch.bfloat16, FLOAT32_MODULES)
    half.to(machine.device).eval()
    c = model.config
    frames = TOKENS_PER_FRAME * conditions.lip.shape[1]
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(c.codes, (1, c.levels, frames), generator=g)
    tokens = tokens.masked_fill(torch.rand(tokens.shape, generator=g) < 0.5, model.mask_id).to(machine.device)
    t = torch.full((1,), 0.5, device=machine.device)
    exact = guided_posterior(model, conditions, pipeline.guidance)(tokens, t, None).float()
    rounded = guided_posterior(half, conditions, pipeline.guidance)(tokens, t, None).float()
    divergence = (exact.exp() * (exact - rounded)).nan_to_num(0.0, posinf=0.0, neginf=0.0).sum(-1).mean()
    yield line("posteriors bf16", float(divergence), "nats", None, DIVERGENCE, "mean KL from float32, bundled HiCoDiT")


def flash(machine: Machine) -> Iterator[Line]:
    if find_spec("flash_attn") is None:
        yield Line("flash-attn", "WARN", note="not installed: bash scripts/setup.sh flash")
        return
    g = torch.Generator(machine.device).manual_seed(0)
    q, k, v = torch.randn(3, 2, 12, 500, 64, generator=g, device=machine.device).bfloat16()
    difference = (attend(q, k, v, None, "flash") - attend(q, k, v, None)).abs().max()
    yield line("flash-attn", float(difference), "", None, DIFFERENCE, "largest difference from sdpa in bfloat16")


@torch.inference_mode()
def hicodit(machine: Machine) -> Iterator[Line]:
    """Measure HiCoDiT with random weights: the sampling steps of one window, without encoders and codec."""
    model = convert_matrices(build_hicodit(machine.size), torch.bfloat16, FLOAT32_MODULES)
    machine.forget_peak()
    model.to(machine.device)
    sampler, guidance = with_preset("fast", SamplerConfig(), GUIDANCE)
    graphs = GraphedSteps(machine.device, backend=machine.backend)
    clips = {s: random_conditions(model, 1, s, machine.device) for s in (machine.seconds, machine.seconds / 5)}

    def speak(seconds: float, eager: bool) -> None:
        generate(model, clips[seconds], sampler, guidance, [0], graphs=GraphedSteps() if eager else graphs)

    yield from _speed(machine, "hicodit", model, speak, *clips, machine.seconds)


@torch.inference_mode()
def talker(machine: Machine) -> Iterator[Line]:
    """Measure Talker-T2AV with random weights: T2AV after a prompt of 40 tokens, batch size 1, CUDA graphs on a GPU."""
    model = build_talker(machine.size).to_precision(torch.bfloat16)
    fuse_layers(model)
    machine.forget_peak()
    model.to(machine.device)
    decoder = BatchedDecoder(model, MODES["t2av"], Sampling(), use_stop=False, backend=machine.backend)
    graphs = decoder.run_step.backend

    def speak(patches: int, eager: bool) -> None:
        decoder.run_step.backend = None if eager else graphs
        decoder.generate([random_request(model, patches, 0)])

    yield from _speed(machine, "talker_t2av", model, speak, machine.patches, 1, 0.16 * machine.patches)


# Frames per second that Talker-T2AV's paper states for one H20 (arXiv 2604.23586, version 2, Table 2).
PAPER_SPEED = {"t2av": 24.0, "a2v": 30.0}


@torch.inference_mode()
def clip(machine: Machine) -> Iterator[Line]:
    """Measure frames per second as in the paper: one clip of 5 s, T2AV and A2V, without and with the codecs.

    The paper does not state whether the codecs are included. Without them, patches are generated from a prompt and, in
    A2V, given latents. With them, A2V also encodes the given audio, both modes encode the portrait and render every
    frame, and T2AV decodes the speech. Weights are random. A clip has 32 patches of 4 frames (at the tiny size, 3).
    """
    patches = 32 if machine.size == "base" else 3
    model = build_talker(machine.size).to_precision(torch.bfloat16)
    fuse_layers(model)
    model.to(machine.device)
    speech = WhisperXVAE(WhisperXVAEConfig(**common.read_config(f"task/codec/whisperx_vae_{machine.size}")))
    portrait = LiaX(LiaXConfig(**common.read_config(f"task/codec/lia_x_{machine.size}")))
    speech.to(machine.device).eval()
    portrait.to(machine.device, memory_format=torch.channels_last).eval()
    portrait.dtype = model.dtype

    frames = patches * model.config.patch_size
    wave = torch.randn(1, 1, frames * speech.hop, device=machine.device) / 10
    latents = torch.randn(frames, speech.channels)
    picture = torch.zeros(3, portrait.size, portrait.size, device=machine.device)
    request = random_request(model, patches, 0)

    def generate_patches(mode: str, decoder: BatchedDecoder, given: Tensor) -> Result:
        (result,) = decoder.generate([replace(request, speech=given) if mode == "a2v" else request])
        return result

    def generate_clip(mode: str, decoder: BatchedDecoder) -> None:
        result = generate_patches(mode, decoder, speech.encode(wave)[0] if mode == "a2v" else latents)
        identity = portrait.identity(picture)
        for part in result.motion.split(64):
            portrait.decode(part, identity)
        if mode == "t2av":
            speech.decode(result.speech[None])

    for mode, stated in PAPER_SPEED.items():
        decoder = BatchedDecoder(model, MODES[mode], Sampling(), use_stop=False, backend=machine.backend)
        took = machine.time(partial(generate_patches, mode, decoder, latents))
        note = f"the paper, on an H20: {stated:g}"
        yield line(f"clip {mode}, without codecs", frames / took, "frames/s", stated, None, note)
        took = machine.time(partial(generate_clip, mode, decoder))
        yield line(f"clip {mode}, with codecs", frames / took, "frames/s", None, None, f"{note}, codecs perhaps")


def _speed(
    machine: Machine, name: str, model: torch.nn.Module, speak: Callable[[Any, bool], None], whole: Any, first: Any,
    seconds: float,
) -> Iterator[Line]:  # fmt: skip
    """Check the real-time factor of `speak(whole)`, the latency of `speak(first)`, and the memory.

    The argument of `speak` selects eager execution, which allows counting operations, or CUDA graphs.
    """
    weights = common.nbytes(model.parameters()) / MIB
    took = machine.time(lambda: speak(whole, False))
    sound = machine.time(lambda: speak(first, False))
    peak = common.peak_memory_mb(machine.device)
    low, high, note = machine.bounds(common.Operators.of(model, lambda: speak(whole, True)))
    yield line(f"{name} real-time factor", took / seconds, "", low / seconds, high / seconds, note)
    low, high, note = machine.bounds(common.Operators.of(model, lambda: speak(first, True)))
    yield line(f"{name} first audio", sound, "s", low, high, note)
    yield line(f"{name} memory", peak, "MiB", weights, 2 * weights + 1024, "the weights, to twice those and 1 GiB")


def train_steps(machine: Machine) -> Iterator[Line]:
    """Run ten training steps of each paper's recipe and compare them with the prediction for one GPU."""
    seconds = machine.step_seconds
    for recipe in ("hicodit_paper", "talker_paper"):
        model, sizes, trainer, rows, total = read_recipe(recipe, [])
        if machine.size == "tiny":
            sizes = common.read_config(f"task/model/{model}_tiny")
        most = min(trainer.batch_size, machine.samples)
        pair = measure_samples(model, sizes, trainer, rows, seconds, max(2, most))
        samples = max(1, min(most, plan(*pair, "ddp", 1, machine.stated, 1, total).largest_batch))
        expected = plan(*pair, "ddp", 1, machine.stated, samples, total)
        result = machine.in_process(training.measure, {
            "model": model, "size": machine.size, "batch": samples * rows, "seconds": seconds, "precision": "bf16",
            "device": machine.device.type, "compile": trainer.compile, "checkpointing": trainer.checkpointing,
            "ema_decay": trainer.ema_decay, "warmup": 2, "steps": machine.steps,
            "peak_tflops": machine.rates.bf16 / 1e12, "changes": sizes,
        })  # fmt: skip
        if result.get("out_of_memory"):
            raise UserError(f"{recipe}: {samples} samples of {seconds:g} s do not fit into the memory of the GPU")
        how = f"{samples} samples of {seconds:g} s"
        how += f", predicted {expected.step_s:.3g} s" + ("" if machine.card else ", of an unknown GPU")
        step = result["step_s"]
        yield line(f"{recipe} step", step, "s", expected.step_s / 2, 2 * expected.step_s, f"{how}; half to twice that")
        memory = sum(expected.memory.values()) / 2**30
        gib = result["peak_gib"]
        yield line(f"{recipe} memory", gib, "GiB", memory / 2, LEAST * memory, f"predicted {memory:.3g} GiB")


def service(machine: Machine) -> Iterator[Line]:
    """Measure requests per second of the web service with the bundled models, each for half a second of speech."""
    requests = 48 if machine.size == "base" else 4
    parser = argparse.ArgumentParser()
    serving.add_arguments(parser)
    args = parser.parse_args(["--requests", str(requests), "--mixed", "0"])
    args.threads = torch.get_num_threads()
    args.device = machine.device
    least = 1 / serving.SPEECH["max_seconds"]
    for result, _ in serving.run(args):
        name = f"service {result['clients']} clients"
        if result["answers"] != {"speech: as it should": requests} or result["left_inside"]:
            yield Line(name, "FAIL", note=f"answers {result['answers']}, {result['left_inside']} left inside")
            continue
        value = result["requests_a_second"]
        note = f"at least {'real time' if result['clients'] == 1 else 'what fewer clients got'}; "
        yield line(name, value, "requests/s", least, None, note + f"median {result['p50_s']:g} s")
        least = max(least, 0.9 * value)


CHECKS: dict[str, Callable[[Machine], Iterator[Line]]] = {
    "driver": versions, "rates": rates, "tests": gpu_tests, "graphs": graphs, "posteriors": posteriors,
    "flash": flash, "hicodit": hicodit, "talker_t2av": talker, "clip": clip, "training": train_steps,
    "service": service, "two_gpus": two_gpus, "collectives": collectives,
}  # fmt: skip


def run_checks(machine: Machine, names: Collection[str]) -> Iterator[Line]:
    """Yield the results of checks. A check that raises an error becomes a FAIL, and the others continue."""
    for name, check in CHECKS.items():
        if name in names:
            try:
                yield from check(machine)
            except Exception as error:
                yield Line(name, "FAIL", note=printable(f"{type(error).__name__}: {error}")[:300])
            machine.forget_peak()
