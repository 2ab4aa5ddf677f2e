"""scripts/recipes/grid.sh from official files of GRID to a report, on a few made-up clips and at small size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rehearsal.trees import write_clip

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "PREPARE": "device=cpu workers=0",
    "TOKENIZE": (
        "trainer.steps=2 trainer.batch_size=2 trainer.global_batch_size=null trainer.warmup=1 trainer.workers=0 "
        "trainer.device=cpu trainer.precision=fp32 data.train.samples=9600 task.mel.n_mels=[20] task.mel.windows=[128] "
        "task.period.periods=[2] task.period.channels=2 task.spectrogram.fft_sizes=[206] task.spectrogram.channels=2 "
        "task.validation.clips=1"
    ),
    "TRAIN": (
        "trainer.steps=2 trainer.batch_size=2 trainer.global_batch_size=null trainer.warmup=1 trainer.workers=0 "
        "trainer.device=cpu trainer.precision=fp32 task.validate_clips=1 task.validate_metrics=[stoi] "
        "task.sampler.steps=1 task.model.width=40 task.model.low_blocks=1 task.model.high_blocks=1 "
        "task.model.lip_dim=40 task.encoders.lip_blocks=1 task.encoders.lip_width=4"
    ),
    "EVALUATE": "device=cpu workers=1 metrics=[stoi,estoi,pesq_narrow] resamples=50 media=false",
}  # fmt: skip


def grid(folder: Path, *steps: str, **variables: str) -> subprocess.CompletedProcess:
    names = {"GRID": "grid", "SHARDS": "shards", "TOKENIZER": "rvq", "RUN": "run", "REPORT": "report"}
    paths = {name: str(folder / value) for name, value in names.items()}
    paths["LAGS"] = "null"  # too few clips to measure them: see tests/corpora/test_lags.py
    surroundings = os.environ | SIZES | paths | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    command = ["bash", str(ROOT / "scripts" / "recipes" / "grid.sh"), *steps]
    return subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)


def test_grid_from_its_files_to_a_report(tmp_path):
    for name in ("resemblyzer", "pystoi", "pesq"):
        pytest.importorskip(name)
    for number, name in enumerate(("bbaf2n", "lbbc1a", "pgwi9s", "prav6s")):
        write_clip(tmp_path / "grid" / "s1" / f"{name}.mpg", number)
        times = tmp_path / "grid" / "alignments" / "s1" / f"{name}.align"
        times.parent.mkdir(parents=True, exist_ok=True)
        times.write_text("0 10000 sil\n10000 20000 bin\n20000 30000 sil\n")
    done = grid(tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    index = json.loads((tmp_path / "shards" / "train" / "index.json").read_text())
    assert index["clips"] == 2 and len(index["symbols"]) == 51 and {"rvq", "ge2e"} <= set(index["digests"])
    results = json.loads((tmp_path / "report" / "test" / "results.json").read_text())
    assert {f: cell["clips"] for f, cell in results["systems"]["hicodit"].items()} == dict.fromkeys(
        ("stoi", "estoi", "pesq_narrow"), 1
    )
    (table,) = results["paper_tables"]
    assert table["rows"]["Visual Voice Memory, known speakers"][table["columns"].index("estoi")] == 0.602


@pytest.mark.parametrize(
    ("variables", "speakers"),
    [({}, "s31,s32,s33,s34"), ({"NEW_SPEAKERS": "[s2,s9]"}, "s2,s9"), ({"NEW_SPEAKERS": ""}, "")],
)
def test_the_speech_corpus_has_the_speakers_that_do_not_train(tmp_path, variables, speakers):
    (tmp_path / "grid" / "s1").mkdir(parents=True)
    done = grid(tmp_path, "tokenizer", SIZE="cpu", PYTHON="echo", **variables)
    assert done.returncode == 0 and f" --new-speakers {speakers} --prompts " in done.stdout, done.stdout + done.stderr
