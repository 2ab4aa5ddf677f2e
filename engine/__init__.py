"""Training and media machinery that knows no model: trainer, checkpoints, release folders, audio and video files."""

import time

STARTED = time.perf_counter()  # when the running command began, or nearly
