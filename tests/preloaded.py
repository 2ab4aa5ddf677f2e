"""What the server of `forked` imports, for all processes at once."""

import importlib
from contextlib import suppress

from engine.errors import UserError, require_librosa

for name in (
    "corpora.preparation.filters", "corpora.preparation.job", "corpora.preparation.media",
    "corpora.preparation.networks", "corpora.preparation.sources_listed",
    "corpora.preparation.sources_grid", "corpora.synthetic.corpus", "engine.training.trainer", "hicodit.inference",
    "hicodit.task", "lia_x.task", "matplotlib.pyplot", "talker_t2av.inference", "talker_t2av.task", "torch._dynamo",
    "torch.distributed.fsdp", "transformers.models.whisper", "pytest",
):  # fmt: skip
    importlib.import_module(name)
with suppress(UserError):
    require_librosa()
