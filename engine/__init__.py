"""Model-independent infrastructure: training, checkpoints, release folders, audio and video files, metrics."""

import os
import time

# With device=mps, operators that are not implemented for MPS run on the CPU.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
STARTED = time.perf_counter()  # approximate start time of the command
