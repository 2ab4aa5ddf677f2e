"""Sample from a model: `python infer.py input=CLIP.mp4 output=DIR`. With no arguments, the bundled clip speaks."""

from __future__ import annotations

import sys

from engine.config import load
from engine.errors import UserError, run_cli

HELP = """
Give a silent clip of a talking face its voice. For each clip NAME the output folder gets NAME.wav, NAME.mp4 (the clip
with its new sound) and NAME.png (mouth crops, spectrogram, token levels). input may be a folder: its clips are done in
batches, and one that fails is reported while the rest go on (exit code 1 at the end). Files that are there already are
replaced only when the new ones are complete.

Examples:
python infer.py
python infer.py input=clip.mp4 output=spoken seed=3
python infer.py input=clips/ output=spoken batch_size=16 sampler.steps=16
python infer.py input=clip.mp4 reference_audio=voice.wav guidance.all=2.0 guidance.lip=1.0
"""


def main() -> int:
    config = load("infer", sys.argv[1:], HELP)
    if config.model != "hicodit":
        raise UserError(f"model={config.model} is unknown; choose hicodit")
    from hicodit.inference import run  # after the arguments are checked: importing torch takes seconds

    return run(config)


if __name__ == "__main__":
    run_cli(main)
