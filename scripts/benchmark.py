"""Measure speed and memory:

    python scripts/benchmark.py NAME [options]

Prints a line per setting and writes OUT/DATE-NAME-DEVICE.json with command, hardware, versions and results. A run
that ends early writes what it has measured to OUT/DATE-NAME-DEVICE-stopped.json. `python scripts/benchmark.py NAME
--help` explains the measurement.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import sys
from importlib import import_module
from pathlib import Path

import torch

from engine.arguments import Parser, within
from engine.device import pick_device
from engine.errors import run_cli
from engine.files import writable
from engine.record import RESULTS, write_record
from engine.settings import DEVICES

NAMES = ("claims", "faces", "inference", "lags", "reenactment", "serving", "training")


def main() -> None:
    first = Parser(__doc__)
    first.add_argument("name", choices=NAMES, help="what to measure")
    name = first.parse_args(sys.argv[1:2]).name
    benchmark = import_module(f"benchmarks.{name}")
    parser = Parser(benchmark.__doc__, f"benchmark.py {name}")
    parser.add_argument("--threads", type=within(1), default=torch.get_num_threads(), help="CPU threads")
    devices = ("cpu",) if getattr(benchmark, "CPU_ONLY", False) else DEVICES
    parser.add_argument("--device", choices=devices, default=devices[0], help="device of the measurements")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON record")
    benchmark.add_arguments(parser)
    args = parser.parse_args(sys.argv[2:])
    torch.set_num_threads(args.threads)
    args.device = pick_device(args.device)
    what = benchmark.__doc__.splitlines()[0]
    settings = {key: str(value) for key, value in vars(args).items()}
    stem = f"{benchmark.record_name(args) if hasattr(benchmark, 'record_name') else name}-{args.device.type}"
    results = []
    with writable(args.out, "--out"):
        try:
            for result, line in benchmark.run(args):
                results.append(result)
                print(line, flush=True)
        except BaseException:
            if results:
                stem = f"{stem}-stopped"
                print(write_record(args.out, stem, what, results, args.device.type, arguments=settings), flush=True)
            raise
        print(write_record(args.out, stem, what, results, args.device.type, arguments=settings))


if __name__ == "__main__":
    run_cli(main)
