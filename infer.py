"""Run inference: `python infer.py [model=NAME] [key=value ...]`. The default input is the bundled silent clip.

The command `speaking-faces` does the same from any folder, and `speaking-faces train` what train.py does.
"""

from __future__ import annotations

if __name__ == "__main__":
    from scripts import environment  # noqa: F401 -- checks the environment before other imports

import runpy
import sys
from importlib import import_module
from pathlib import Path

import hydra
from omegaconf import DictConfig

from engine.batch_runner import run_jobs
from engine.config import CONFIGS
from engine.errors import UserError, run_cli
from engine.program import run_program, runs
from engine.progress import showing, stage

HICODIT = """
Generate the speech of a silent clip of a talking face. For each clip NAME the output folder gets NAME.wav, NAME.mp4
(the clip with the generated speech) and NAME.png (mouth crops, spectrogram, token levels). If input is a folder, its
clips are processed in batches; a clip that fails is reported and the others continue (exit code 1 at the end). Existing
files are replaced only when the new ones are complete.

For talking faces from text or audio: python infer.py model=talker_t2av --help

Examples:
python infer.py
python infer.py input=clip.mp4 output=spoken seed=3
python infer.py input=clips/ output=spoken batch_size=16 sampler.steps=6
python infer.py input=clip.mp4 sampler=paper sampler.steps=16
python infer.py input=clip.mp4 reference_audio=voice.wav guidance.all=2.0 guidance.lip=1.0
python infer.py input=clip.mp4 face=2 debug=true
python infer.py input=clip.mp4 stream=true lookahead=0.8
"""

TALKER = """
Generate speech and talking faces. mode=t2av: text to speech and a talking face; tts: text to speech; a2v: a face that
moves to the given audio, which is kept sample for sample; v2a: speech for a given clip, whose frames are kept. The
output folder gets NAME.wav, except for tts NAME.mp4, and for t2av and a2v NAME.png (frames, spectrogram, movement
of the mouth, loudness). In a2v the given audio file is copied instead of NAME.wav, and keeps its suffix (NAME.mp3); the
audio of a given .mp4 is in NAME.mp4 alone. Longer texts are split at sentences, else clauses, else words, into parts of
up to 190 bytes (bundled model: 120), which are spoken with one voice and short pauses between. With jobs=FILE.jsonl, a
job that fails is reported and the others continue (exit code 1 at the end). Existing files are replaced only when the
new ones are complete.

Examples:
python infer.py model=talker_t2av
python infer.py model=talker_t2av mode=t2av text="set red in hotel three" reference_audio=V.wav reference_video=F.mp4
python infer.py model=talker_t2av mode=tts text="lay green by alpha one now" reference_audio=V.wav output=spoken seed=3
python infer.py model=talker_t2av mode=a2v audio=speech.wav reference_video=F.mp4 text="what it says"
python infer.py model=talker_t2av mode=v2a video=silent.mp4 reference_audio=V.wav text="what the lips say"
python infer.py model=talker_t2av jobs=many.jsonl batch_size=16 sampling.steps=6 sampling.guidance=1
python infer.py model=talker_t2av weights=DOWNLOADED text="hello" reference_audio=V.wav reference_video=F.mp4
"""

PROGRAMS = {  # by model: the configuration, the help
    "hicodit": ("infer", HICODIT),
    "talker_t2av": ("infer_talker", TALKER),
}


@hydra.main(config_path=str(CONFIGS), config_name="infer", version_base="1.3")
@runs(output="output")
def infer(config: DictConfig) -> int:
    c, jobs = import_module(f"{config.model}.settings").read_settings(config)
    with showing():
        with stage("loading"):  # importing PyTorch takes seconds
            inference = import_module(f"{config.model}.inference")
        return run_jobs(inference.runner_of(c), jobs, c)


def main() -> int:
    """Run the program of `model=`. Each model has its own configuration."""
    models = [word for word in sys.argv[1:] if word.startswith("model=")]
    model = models[-1].removeprefix("model=") if models else "hicodit"
    if model not in PROGRAMS:
        raise UserError(f"model={model} is unknown; choose {', '.join(PROGRAMS)}")
    config_name, help_text = PROGRAMS[model]
    words = [word for word in sys.argv[1:] if word not in models]
    others = {name: f"model={other}" for other, (name, _) in PROGRAMS.items() if other != model}
    return run_program(infer, config_name, help_text, words, others)


def command() -> None:
    """Run the console command `speaking-faces`."""
    from scripts import environment  # noqa: F401 -- as above

    if sys.argv[1:2] == ["train"]:
        del sys.argv[1]
        runpy.run_path(str(Path(__file__).with_name("train.py")), run_name="__main__")
    else:
        run_cli(main)


if __name__ == "__main__":
    run_cli(main)
