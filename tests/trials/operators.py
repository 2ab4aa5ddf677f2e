"""Operators, host reads and host copies of training steps and inner loops, on a CUDA device that is not there.

    python -m tests.trials.operators --record benchmarks/results

Toy sizes, as in tests/golden: the number of operators grows with the layers, what waits for the device does not. On
tensors without data a read by the host raises an error, which is counted and ends the step. Copies to the device are
those of lengths and of what is computed from them; one waits unless it is sent from pinned memory. Operators of a
training step: of the losses in autocast, and with the backward pass and the update, which are counted on the processor.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from engine.errors import run_cli
from engine.record import write_record
from tests.gpu.fakes import Operators
from tests.gpu.test_inner_loops import STEPS as SAMPLER_STEPS
from tests.gpu.test_inner_loops import run_patches, run_sampler
from tests.gpu.test_task_steps import STEPS, made, take_step, update

PATCHES = 3
SINGLE = ("identity", "expression", "lip")  # conditions with a guidance scale of their own
# `confidence` runs as in configs/sampler/fast.yaml, with two branches of guidance; the others with all five.
SAMPLERS = {"confidence": dict.fromkeys(SINGLE, 0.0), "ordered": {}, "euler": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="folder for a dated record, such as benchmarks/results")
    args, results = parser.parse_args(), []

    def take(what: str, found: dict[str, Any]) -> None:
        results.append({"what": what, **found})
        print(line(results[-1]), flush=True)

    for name, step in ((name, step) for name, steps in STEPS.items() for step in steps):
        with tempfile.TemporaryDirectory() as scratch:
            task, data = made(name, Path(scratch))
            found = counted(lambda task=task, data=data, step=step: take_step(task, data, step))
            both = number(take_step(task, data, step, "cpu", update))
            take(f"training step {step} of {name}", found | {"operators_with_backward": both})
    for method, scales in SAMPLERS.items():
        call = partial(run_sampler, method, torch.float32, **scales)
        take(f"a step of HiCoDiT's sampler {method}", counted(call, SAMPLER_STEPS))
    take("a patch of Talker-T2AV", counted(lambda: run_patches(torch.float32, 2.0), PATCHES))
    if args.record:
        write_record(
            args.record, "operators", "Operators, host reads and copies on a CUDA device without data", results
        )


def counted(call: Callable[[], Operators], steps: int = 1) -> dict[str, Any]:
    """What a call did, divided by `steps`."""
    try:
        operators = call()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        return {"host_reads": 1, "read": str(error)}
    return {
        "host_reads": 0,
        "operators": number(operators) / steps,
        "copies_to_device": operators.sent / steps,
        "copies_that_wait": operators.waiting / steps,
        "most": dict(operators.counts.most_common(5)),
    }


def number(operators: Operators) -> int:
    """Operators that ran; making room for a tensor is none."""
    return sum(n for name, n in operators.counts.items() if not name.startswith("empty"))


def line(found: dict[str, Any]) -> str:
    figures = " ".join(f"{k} {v:.0f}" for k, v in found.items() if isinstance(v, float | int))
    return f"{found['what']}: {figures}"


if __name__ == "__main__":
    run_cli(main)
