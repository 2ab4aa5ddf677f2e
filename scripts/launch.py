"""torchrun with the trainer's exit code: 75 (`engine.training.signals.REQUEUE`) if training was stopped and saved.

torchrun itself exits with 1 whatever its processes return, and is killed by SIGUSR1. The arguments are torchrun's:

    python -m scripts.launch --nproc_per_node=8 --max-restarts=3 train.py experiment=NAME
"""

from __future__ import annotations

import signal
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from engine.training.signals import REQUEUE

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main() -> int:
    try:
        torchrun(["--signals-to-handle", SIGNALS, *sys.argv[1:]])
    except SignalException as stopped:
        return 130 if stopped.sigval == signal.SIGINT else REQUEUE
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if REQUEUE in codes:  # the group saved together; torchrun may have ended some on their way out
            return REQUEUE
        print(f"error: processes ended with exit codes {codes}; what they said is above", file=sys.stderr)
        return max(codes) if min(codes) >= 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
