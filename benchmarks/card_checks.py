"""The checks of a card, by name; scripts/check_gpu.py runs them. `size` is base, or tiny for a trial.

Axes: B clips, K token levels, L token frames, N codes.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks import serving, training
from benchmarks.card import LEAST, MIB, ROOT, Check, Line, Machine, judge
from benchmarks.common import Operators, nbytes, read_config
from benchmarks.inference import CLIP, GUIDANCE, build_hicodit, build_talker, random_conditions, random_request
from benchmarks.plan import measure_samples, plan, read_recipe
from engine.cuda_graph import GraphedSteps
from engine.errors import UserError
from engine.precision import convert_matrices
from hicodit.conditions.types import Conditions
from hicodit.generation import generate, guided_posterior, window
from hicodit.layers import attend
from hicodit.model import FLOAT32, TOKENS_PER_FRAME, HiCoDiT
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import BUNDLED as HICODIT
from hicodit.settings import SamplerConfig, with_preset
from hicodit.system import HiCoDiTSystem
from talker_t2av.fused import fuse_layers
from talker_t2av.generation import Rows
from talker_t2av.request import MODES, Sampling
from talker_t2av.system import BUNDLED, TalkerSystem

# Seconds of HiCoDiT's clip, patches of Talker-T2AV, seconds and most samples of a training step, number of steps.
SCALE = {"base": (10.0, 25, 8.0, 64, 10), "tiny": (1.0, 3, 0.4, 2, 2)}
TWO_CARDS = "two_cards or killed_rank"  # of tests/gpu/test_cards.py
PATIENCE = 900  # seconds for the tests
DRIFT, DIVERGENCE, DIFFERENCE = 1e-3, 0.004, 0.02  # bounds: latents of graphs, KL of bfloat16, flash-attn


def line(name: str, value: float, unit: str, low: float | None, high: float | None, note: str = "") -> Line:
    return Line(name, judge(value, low, high), value, unit, low, high, note)


def versions(machine: Machine, size: str) -> Iterator[Line]:
    driver, toolkit = machine.versions()
    verdict = "PASS" if math.isfinite(toolkit) and driver >= int(toolkit) else "FAIL"
    yield Line("driver", verdict, driver, "CUDA", None, None, f"PyTorch {torch.__version__} has CUDA {toolkit:g}")


def rates(machine: Machine, size: str) -> Iterator[Line]:
    card, found = machine.card, machine.rates
    figures = {
        "matrix rate bf16": (found.bf16 / 1e12, card and card.peak, "TFLOP/s", 0.5),
        "matrix rate fp32": (found.fp32 / 1e12, card and card.single, "TFLOP/s", 0.5),
        "copy rate": (found.copy / 1e9, card and card.bandwidth / 1e9, "GB/s", 0.7),
    }
    for name, (value, stated, unit, share) in figures.items():
        if stated is None:
            yield Line(name, "WARN", value, unit, note=f"no data sheet of {machine.name} in benchmarks/plan.py")
        else:
            note = f"{share:.0%} to 105 % of the data sheet's {stated:g}"
            yield line(name, value, unit, share * stated, 1.05 * stated, note)


def card_tests(machine: Machine, size: str) -> Iterator[Line]:
    """All tests of tests/gpu for one card; a skipped one counts as failed."""
    yield _pytest(machine, "tests/gpu", f"not ({TWO_CARDS})")


def two_cards(machine: Machine, size: str) -> Iterator[Line]:
    """DDP and FSDP2 over NCCL, and a run that goes on after one of its processes was killed."""
    if machine.cards > 1:
        yield _pytest(machine, "two cards", TWO_CARDS)


def _pytest(machine: Machine, name: str, expression: str) -> Line:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", str(machine.tests), f"--junitxml={report}", "-k", expression]
        done = subprocess.run(command, cwd=ROOT, timeout=PATIENCE, capture_output=True, text=True)
        if not report.is_file():
            raise UserError(f"pytest ended with exit code {done.returncode}: {(done.stderr or done.stdout)[-200:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    ways = ("failure", "error", "skipped")
    bad = [case.get("name", "") for case in cases if any(case.find(way) is not None for way in ways)]
    note = f"of {len(cases)}" + (f": {', '.join(bad[:8])}" if bad else "")
    verdict = "FAIL" if bad or not cases else "PASS"
    return Line(name, verdict, len(bad), "failed or skipped", 0, 0, note)


def graphs(machine: Machine, size: str) -> Iterator[Line]:
    """Steps replayed as CUDA graphs against the same steps called one by one, with the bundled models in float32."""
    model, conditions, pipeline = _bundled(machine, size)
    sampler = replace(pipeline.sampler, steps=4)
    tokens = [
        generate(model, conditions, sampler, pipeline.guidance, [0], graphs=graphs)[0]
        for graphs in (GraphedSteps(), GraphedSteps(machine.device, backend=machine.backend))
    ]
    note = f"of {tokens[0].numel():,} of the bundled HiCoDiT, graphs against eager"
    yield line("graphs hicodit", int((tokens[0] != tokens[1]).sum()), "tokens differ", 0, 0, note)
    talker = TalkerSystem.load(BUNDLED, None, machine.device).model
    results = []
    for eager in (True, False):
        rows = Rows(talker, MODES["t2av"], Sampling(4, guidance=2.0), use_stop=False, backend=machine.backend)
        if eager:
            rows.run_step.backend = None
        results.append(rows.generate([random_request(talker, SCALE[size][1], 0)])[0])
    one, two = results
    drift = max(float((getattr(one, s) - getattr(two, s)).abs().max()) for s in ("speech", "motion"))
    yield line("graphs talker", drift, "", 0, DRIFT, "largest difference of latents of the bundled Talker-T2AV")


def _bundled(machine: Machine, size: str) -> tuple[HiCoDiT, Conditions, HiCoDiTPipeline]:
    """The bundled HiCoDiT in float32, and the conditions of the demo clip."""
    pipeline = HiCoDiTPipeline.from_pretrained(device=machine.device, precision="fp32")
    conditions = pipeline.conditions([pipeline.crops(CLIP)])
    if size == "tiny":
        conditions = window(conditions, [0], [(0, 25)])
    return pipeline.system.model, conditions, pipeline


@torch.inference_mode()
def posteriors(machine: Machine, size: str) -> Iterator[Line]:
    """KL divergence of the bundled HiCoDiT's log posteriors in bfloat16 from those in float32."""
    model, conditions, pipeline = _bundled(machine, size)
    half = convert_matrices(HiCoDiTSystem.from_pretrained(HICODIT).model, torch.bfloat16, FLOAT32)
    half.to(machine.device).eval()
    c, frames = model.config, TOKENS_PER_FRAME * conditions.lip.shape[1]
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(c.codes, (1, c.levels, frames), generator=g)
    tokens = tokens.masked_fill(torch.rand(tokens.shape, generator=g) < 0.5, model.mask_id).to(machine.device)
    t = torch.full((1,), 0.5, device=machine.device)
    one, two = (guided_posterior(m, conditions, pipeline.guidance)(tokens, t, None).float() for m in (model, half))
    divergence = (one.exp() * (one - two)).nan_to_num(0.0, posinf=0.0, neginf=0.0).sum(-1).mean()
    yield line("posteriors bf16", float(divergence), "nats", None, DIVERGENCE, "mean KL from float32, bundled HiCoDiT")


def flash(machine: Machine, size: str) -> Iterator[Line]:
    if find_spec("flash_attn") is None:
        yield Line("flash-attn", "WARN", note="not installed: bash scripts/setup.sh flash")
        return
    g = torch.Generator(machine.device).manual_seed(0)
    q, k, v = torch.randn(3, 2, 12, 500, 64, generator=g, device=machine.device).bfloat16()
    difference = (attend(q, k, v, None, "flash") - attend(q, k, v, None)).abs().max()
    yield line("flash-attn", float(difference), "", None, DIFFERENCE, "largest difference from sdpa in bfloat16")


@torch.inference_mode()
def hicodit(machine: Machine, size: str) -> Iterator[Line]:
    """HiCoDiT with random weights: the sampler's steps of one window, without encoders and codec."""
    model = convert_matrices(build_hicodit(size), torch.bfloat16, FLOAT32)
    machine.forget_peak()
    model.to(machine.device)
    sampler, guidance = with_preset("fast", SamplerConfig(), GUIDANCE)
    graphs = GraphedSteps(machine.device, backend=machine.backend)

    def speak(seconds: float) -> Callable[[bool], Any]:
        conditions = random_conditions(model, 1, seconds, machine.device)
        return lambda eager: generate(
            model, conditions, sampler, guidance, [0], graphs=GraphedSteps() if eager else graphs
        )

    whole = SCALE[size][0]
    yield from _speed(machine, "hicodit", model, speak(whole), speak(whole / 5), whole)


@torch.inference_mode()
def talker(machine: Machine, size: str) -> Iterator[Line]:
    """Talker-T2AV with random weights: t2av after a prompt of 40 tokens, one row, graphs on CUDA."""
    model = build_talker(size).to_precision(torch.bfloat16)
    fuse_layers(model)
    machine.forget_peak()
    model.to(machine.device)
    rows = Rows(model, MODES["t2av"], Sampling(), use_stop=False, backend=machine.backend)
    most = SCALE[size][1]

    def speak(patches: int) -> Callable[[bool], Any]:
        def call(eager: bool) -> None:
            backend = rows.run_step.backend
            rows.run_step.backend = None if eager else backend
            rows.generate([random_request(model, patches, 0)])
            rows.run_step.backend = backend

        return call

    yield from _speed(machine, "talker", model, speak(most), speak(1), 0.16 * most)


def _speed(
    machine: Machine, name: str, model: torch.nn.Module, whole: Callable[[bool], Any], first: Callable[[bool], Any],
    seconds: float,
) -> Iterator[Line]:  # fmt: skip
    """Judge the real-time factor of `whole`, which makes so many seconds, the time of `first`, and the memory.

    Both take whether steps are called one by one, so that their work can be counted, or replayed as graphs.
    """
    weights = nbytes(model.parameters()) / MIB
    took, sound = machine.time(name, lambda: whole(False)), machine.time(f"{name} first sound", lambda: first(False))
    peak = machine.peak(name)
    low, high, note = machine.bounds(Operators.of(model, lambda: whole(True)))
    yield line(f"{name} real-time factor", took / seconds, "", low / seconds, high / seconds, note)
    low, high, note = machine.bounds(Operators.of(model, lambda: first(True)))
    yield line(f"{name} first sound", sound, "s", low, high, note)
    yield line(f"{name} memory", peak, "MiB", weights, 2 * weights + 1024, "the weights, to twice those and 1 GiB")


def train_steps(machine: Machine, size: str) -> Iterator[Line]:
    """Ten steps of each paper's recipe beside the prediction for one card."""
    seconds, samples, steps = SCALE[size][2:]
    card = machine.stated
    for recipe in ("hicodit_paper", "talker_paper"):
        model, sizes, trainer, rows, total = read_recipe(recipe, [])
        if size == "tiny":
            sizes = read_config(f"model/{training.MODELS[model]}_tiny")
        most = min(trainer.batch_size, samples)
        pair = measure_samples(model, sizes, trainer, rows, seconds, max(2, most))
        samples = max(1, min(most, plan(*pair, "ddp", 1, card, 1, total).largest_batch))
        expected = plan(*pair, "ddp", 1, card, samples, total)
        peak = machine.rates.bf16 / 1e12
        result = machine.in_process(training.measure, {
            "model": model, "size": size, "batch": samples * rows, "seconds": seconds, "precision": "bf16",
            "device": machine.device.type, "compile": trainer.compile, "checkpointing": trainer.checkpointing,
            "ema_decay": trainer.ema_decay, "warmup": 2, "steps": steps, "peak_tflops": peak, "changes": sizes,
        })  # fmt: skip
        if result.get("out_of_memory"):
            raise UserError(f"{recipe}: {samples} samples of {seconds:g} s do not fit the card")
        step = machine.reading(f"{recipe} step seconds", result["step_s"])
        how = f"{samples} samples of {seconds:g} s"
        how += f", predicted {expected.step_s:.3g} s" + ("" if machine.card else ", of a card that is not known")
        yield line(f"{recipe} step", step, "s", expected.step_s / 2, 2 * expected.step_s, f"{how}; half to twice that")
        memory, gib = sum(expected.memory.values()) / 2**30, machine.reading(f"{recipe} GiB", result["peak_gib"])
        yield line(f"{recipe} memory", gib, "GiB", memory / 2, LEAST * memory, f"predicted {memory:.3g} GiB")


def service(machine: Machine, size: str) -> Iterator[Line]:
    """Requests a second of the web service with the bundled models, each for half a second of speech."""
    requests = 48 if size == "base" else 4
    args = argparse.Namespace(
        clients=[1, 4, 16],
        requests=requests,
        mixed=0,
        rows=8,
        size="tiny",
        precision="auto",
        sampling="release",
        threads=torch.get_num_threads(),
        device=machine.device,
    )
    least = 1 / serving.SPEECH["max_seconds"]
    for result, _ in serving.run(args):
        name = f"service {result['clients']} clients"
        if result["answers"] != {"speech: as it should": requests} or result["left_inside"]:
            yield Line(name, "FAIL", note=f"answers {result['answers']}, {result['left_inside']} left inside")
            continue
        value = machine.reading(name, result["requests_a_second"])
        note = f"at least {'real time' if result['clients'] == 1 else 'what fewer clients got'}; "
        yield line(name, value, "requests/s", least, None, note + f"median {result['p50_s']:g} s")
        least = max(least, 0.9 * value)


CHECKS: dict[str, Check] = {
    "driver": versions, "rates": rates, "tests": card_tests, "graphs": graphs, "posteriors": posteriors,
    "flash": flash, "hicodit": hicodit, "talker": talker, "training": train_steps, "service": service,
    "two_cards": two_cards,
}  # fmt: skip
