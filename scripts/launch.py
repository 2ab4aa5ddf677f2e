"""torchrun with the trainer's exit code: 75 (`engine.training.signals.REQUEUE`) if training was stopped and saved.

torchrun itself always exits with 1 on failure, is killed by SIGUSR1, and kills its processes 30 s after a stop signal;
here they have `GRACE` seconds to save. The arguments are torchrun's:

    python -m scripts.launch --nproc_per_node=8 --max-restarts=3 train.py experiment=NAME
"""

from __future__ import annotations

import signal
import sys
from typing import Any

from torch.distributed.elastic.multiprocessing import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import config_from_args, parse_args, run

from engine.training.signals import REQUEUE

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
GRACE = 270  # seconds from a stop signal to SIGKILL; scripts/cluster/train.sbatch asks SLURM for a warning of 300


def main() -> int:
    args = parse_args(["--signals-to-handle", SIGNALS, *sys.argv[1:]])
    try:
        processes = config_from_args(args)[0].nproc_per_node
        if processes < 1:
            raise ValueError(f"--nproc_per_node={processes} must be at least 1")
    except (ValueError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    codes: list[int] = []
    close = PContext.close

    def patient_close(context: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        """Close the agent. A stopping run has time to save; after a failure, other processes hang in a collective."""
        close(context, death_sig, GRACE if isinstance(sys.exc_info()[1], SignalException) else timeout)
        handlers: dict[int, Any] = getattr(context, "subprocess_handlers", {})
        codes.extend(handler.proc.returncode for handler in handlers.values())

    PContext.close = patient_close
    try:
        run(args)
    except ValueError as error:  # an unknown --rdzv_backend; a failed process raises ChildFailedError
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            return 130
        if REQUEUE in codes:
            return REQUEUE
        if any(codes):
            print(f"error: stopped before anything was saved; exit codes {codes}", file=sys.stderr)
            return 1
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if REQUEUE in codes:  # the group saved together; torchrun may have ended some on their way out
            return REQUEUE
        print(f"error: processes ended with exit codes {codes}; see their output above", file=sys.stderr)
        return max(codes) if min(codes) >= 0 else 1
    finally:
        PContext.close = close
    return 0


if __name__ == "__main__":
    sys.exit(main())
