"""Check whether a GPU works correctly and how close it is to its limits.

    python scripts/check_gpu.py                    # one GPU, under ten minutes
    python scripts/check_gpu.py --gpus 8           # also DDP, FSDP2, a killed process, collectives
    python scripts/check_gpu.py --only rates graphs

Prints a line per result. PASS: the value is within its range. WARN: within a factor of two of it, or something is not
installed or unknown. FAIL: outside of it, or the check raised an error. Writes OUT/DATE-check-gpu-NAME.json. Exit code
1 if a line is FAIL, 2 without a GPU. What is checked is in benchmarks/gpu_checks.py; weights are random or bundled.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import re
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu_checks import CHECKS, Machine, run_checks
from engine.arguments import Parser, within
from engine.errors import UserError, run_cli
from engine.files import writable
from engine.record import RESULTS, write_record


def main(machine: Machine | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--gpus", type=within(1, 64), default=1, help="number of GPUs of this machine to use")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="checks to run (default: all)")
    parser.add_argument("--size", choices=("tiny", "base"), default="base", help="size of the models")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON record")
    args = parser.parse_args()
    there = torch.cuda.device_count()
    if machine is None and there < args.gpus:
        raise UserError(f"{args.gpus} CUDA devices are required, {there} found: run this on a machine with a GPU")
    machine = machine or Machine(torch.device("cuda", 0), args.gpus, args.size)
    begin = time.monotonic()
    lines = []
    try:
        print(machine.name, flush=True)
    except (RuntimeError, AssertionError) as error:  # CUDA cannot be initialised
        reason = " ".join(str(error).split())
        built = f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}"
        print(f"FAIL  driver: {reason}; {built}: install a driver for it, or PyTorch for an older CUDA")
        return 1
    with writable(args.out, "--out"):
        for line in run_checks(machine, args.only):
            lines.append(line)
            print(line, flush=True)
        slug = re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-")
        seconds = round(time.monotonic() - begin)
        print(write_record(
            args.out, f"check-gpu-{slug}", __doc__.splitlines()[0], [asdict(line) for line in lines],
            machine.device.type, gpu=machine.name, seconds=seconds,
        ))  # fmt: skip
    counts = Counter(line.verdict for line in lines)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in ("PASS", "WARN", "FAIL")) + f", {seconds} s")
    return int(counts["FAIL"] > 0)


if __name__ == "__main__":
    run_cli(main)
