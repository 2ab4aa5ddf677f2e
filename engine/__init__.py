"""Training and media machinery that knows no model: trainer, checkpoints, release folders, audio and video files."""

import os
import time

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # device=mps: what PyTorch lacks there runs on the processor
STARTED = time.perf_counter()  # when the running command began, or nearly
