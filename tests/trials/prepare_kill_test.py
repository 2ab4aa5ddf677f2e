"""Prepare shards with processes that are killed repeatedly, and compare them with those of an uninterrupted run.

    python -m tests.trials.prepare_kill_test --reference data/shards --output data/broken --kills 5 -- \
        source.root=data/synthetic splits=[seen] clips_per_shard=50

After -- come settings of scripts/prepare_data.py, the same as those of the uninterrupted run. Its processes run under
torchrun; after a random number of further clips, all of them get SIGKILL. The last start runs to its end.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from engine.errors import UserError, run_cli
from engine.record import write_record

ROOT = Path(__file__).resolve().parents[2]


def clips_done(output: Path, per_shard: int) -> int:
    """About how many clips are in work folders and finished shards."""
    return len(list(output.rglob(".work-0*/*.tar"))) + per_shard * len(list(output.rglob("0*.tar")))


def launch(arguments: list[str], processes: int) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen([*torchrun, str(ROOT / "scripts" / "prepare_data.py"), *arguments], start_new_session=True)


def descendants(pid: int) -> list[int]:
    """A process and all its descendants (Linux)."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(word) for word in children.read_text().split()] if children.exists() else []
    return [pid, *(each for child in found for each in descendants(child))]


def kill_after(process: subprocess.Popen, output: Path, clips: int, per_shard: int) -> bool:
    """Kill a run after so many more clips; False if it ended before."""
    goal = clips_done(output, per_shard) + clips
    while clips_done(output, per_shard) < goal:
        if process.poll() is not None:
            return False
        time.sleep(0.2)
    for pid in reversed(descendants(process.pid)):  # torchrun last, so that it cannot end the others politely
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    return True


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="shards of the uninterrupted run")
    parser.add_argument("--output", type=Path, required=True, help="folder of the killed run")
    parser.add_argument("--kills", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="of torchrun (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=20, help="most clips between two kills (default: %(default)s)")
    parser.add_argument("--per-shard", type=int, default=200, help="clips_per_shard, to count (default: %(default)s)")
    parser.add_argument("--record", type=Path, help="folder that gets a dated JSON of the result")
    parser.add_argument("settings", nargs="*", help="of scripts/prepare_data.py")
    args = parser.parse_args()
    if not args.reference.is_dir():
        raise UserError(f"--reference {args.reference}: prepare it first, with the same settings")
    arguments, draw, kills = [f"output={args.output}", *args.settings], random.Random(0), []
    start = time.monotonic()
    while len(kills) < args.kills:
        process = launch(arguments, args.processes)
        if not kill_after(process, args.output, draw.randint(1, args.clips), args.per_shard):
            break
        kills.append(clips_done(args.output, args.per_shard))
        print(f"killed with about {kills[-1]} clips done", flush=True)
    code = launch(arguments, args.processes).wait()
    ours, theirs = files_of(args.output), files_of(args.reference)
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    result = {
        "kills": len(kills),
        "clips_done_at_kills": kills,
        "exit_code": code,
        "files": len(theirs),
        "bytes": sum(map(len, theirs.values())),
        "different_files": different,
        "seconds": round(time.monotonic() - start, 1),
    }
    print(result)
    if args.record is not None:
        what = f"Preparation with {args.processes} processes, killed with SIGKILL, against an uninterrupted run"
        write_record(args.record, "preparation-kills", what, result)
    return 0 if len(kills) == args.kills and code == 0 and not different else 1


if __name__ == "__main__":
    run_cli(main)
