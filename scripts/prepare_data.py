"""Prepare training shards from raw recordings: `python scripts/prepare_data.py source=NAME output=FOLDER`."""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import sys

import hydra
from omegaconf import DictConfig

from corpora.preparation.job import prepare
from engine.config import CONFIGS
from engine.errors import run_cli
from engine.program import run_program, runs

HELP = """
Turn raw recordings into training shards. OUTPUT/SPLIT gets tar files with the features that both models train on, a
JSON file for each of them, index.json for the whole split, and quarantine.jsonl with the stage and reason of every
rejected clip. After an interruption, the same command continues with the same result. workers=N uses N processes of
this machine, executor=ray many machines.

Examples:
python scripts/prepare_data.py source.root=data/synthetic output=data/shards workers=2
python scripts/prepare_data.py source=lrs3 source.root=/data/lrs3 output=/data/lrs3_shards splits=[trainval]
python scripts/prepare_data.py source=voxceleb2 source.root=/data/vox2 output=/data/vox2 executor=ray ray.workers=64
python scripts/prepare_data.py source=voxceleb2 --help
"""


@hydra.main(config_path=str(CONFIGS), config_name="prepare", version_base="1.3")
@runs(output="output")
def prepare_data(config: DictConfig) -> None:
    prepare(config)


def main() -> int:
    return run_program(prepare_data, "prepare", HELP, sys.argv[1:])


if __name__ == "__main__":
    run_cli(main)
