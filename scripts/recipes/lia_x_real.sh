#!/usr/bin/env bash
# LIA-X for real and cartoon faces: GRID=/data/grid bash scripts/recipes/lia_x_real.sh [STEP ...]
# Steps, in this order: prepare drawn train measure; without any, all of them. Each continues where it stopped.
# Needs the extra `landmarks`, for mouth opening and eye closure in training, and for measurement.
set -euo pipefail
source "$(dirname "$0")/steps.sh"

GRID="${GRID:-/data/grid}"                  # folders s1, s2, ... of GRID (CC BY 4.0)
SPEAKERS="${SPEAKERS:-[s1,s3,s5]}"          # who is trained on
HELD_OUT="${HELD_OUT:-s31 s32 s33 s34}"     # who is measured on
SHARDS="${SHARDS:-data/shards/people}"      # pictures of the people, 30 MB
DRAWN="${DRAWN:-data/synthetic_lia_x}"      # cartoon faces
RUN="${RUN:-runs/lia_x_real}"
# Further settings of each step: PREPARE, TRAIN, MEASURE, such as TRAIN="trainer.steps=1000"

check_grid
$PYTHON - <<'END'
from scripts import environment  # noqa: F401
from engine.errors import run_cli
from engine.faces.landmarks import load_dlib


def check() -> None:
    load_dlib()


run_cli(check)
END

prepare() {
    $PYTHON "$here/scripts/prepare_data.py" source=grid "source.root=$GRID" "source.speakers=$SPEAKERS" \
        source.clips_each=120 source.protocol=seen features=lia_x_paper stages.portraits.size=144 \
        stages.portraits.pictures=25 "output=$SHARDS" "reuse=$SHARDS" ${PREPARE:-}
}

drawn() { # cartoon faces
    $PYTHON "$here/scripts/make_synthetic_corpus.py" --version 2 --out "$DRAWN" --clips 300 --test-clips 40
}

train() {
    if [ -d "$RUN/release" ]; then echo "$RUN/release is there"; return; fi
    $PYTHON "$here/train.py" experiment=lia_x_real "data.corpus=$DRAWN" "data.people=$SHARDS" "run=$RUN" ${TRAIN:-}
}

measure() {
    $PYTHON "$here/scripts/benchmark.py" reenactment --codecs copy "$here/assets/lia_x_real" "$RUN/release" \
        --people $(printf "$GRID/%s " $HELD_OUT) --drawn "$DRAWN" --codes "$here/assets/lia_x_real" \
        --out "$RUN/measured" ${MEASURE:-}
}

run_steps "prepare drawn train measure" "$@"
