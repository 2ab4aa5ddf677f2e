#!/usr/bin/env bash
# HiCoDiT on GRID, all weights trained here: GRID=/data/grid bash scripts/recipes/grid.sh [STEP ...]
# Steps, in this order: prepare tokenizer tokens train evaluate; without any, all of them. Each continues where it stopped.
# SIZE=card: the full recipe, for one GPU. SIZE=cpu: a model of the size of assets/hicodit_grid, in some hours of two cores.
set -euo pipefail
source "$(dirname "$0")/steps.sh"

SIZE="${SIZE:-card}"
GRID="${GRID:-/data/grid}"                # s1.zip to s34.zip and alignments.zip of GRID, unpacked
PROTOCOL="${PROTOCOL:-seen}"              # splits: seen, unseen or lipnet (configs/source/grid.yaml)
case "$SIZE" in
    card) name=hicodit_grid tokenizer=rvq_grid speakers=null new='' pictures=() ;;
    cpu)
        name=hicodit_grid_cpu tokenizer=rvq_speech speakers='[s1,s3,s5]' new='[s31,s32,s33,s34]'
        pictures=(stages.crops.encoders.mouth_size=48 stages.crops.encoders.face_size=64)
        ;;
    *) echo "error: SIZE=$SIZE: give card or cpu" >&2; exit 2 ;;
esac
SPEAKERS="${SPEAKERS:-$speakers}"         # as in [s1,s2,s4,s29]; null: all
SHARDS="${SHARDS:-data/shards/$name}"     # prepared clips, about 32 GB (SIZE=cpu: 0.5 GB)
LAGS="${LAGS:-$SHARDS-lags.csv}"          # lags of the audio, measured if the table is missing; null: it is not moved
TOKENIZER="${TOKENIZER:-runs/$tokenizer}" # run of the tokenizer
RUN="${RUN:-runs/$name}"                  # run of the model
SPEECH="${SPEECH:-data/speech}"           # SIZE=cpu: waves that the tokenizer trains on
PROMPTS="${PROMPTS:-/usr/share/asterisk/sounds}"   # SIZE=cpu: of apt-get install asterisk-core-sounds-{en,es,fr,it,ru}-g722
REPORT="${REPORT:-outputs/grid}"          # reports of the evaluation: test, and new
NEW_SPEAKERS="${NEW_SPEAKERS-$new}"       # speakers that do not train, all of whose sentences are the report `new`; empty: none
DOWNLOADS="${DOWNLOADS:-checkpoints}"     # networks of the metrics: python scripts/download_checkpoints.py metrics
# Further settings of each step: PREPARE, TOKENIZE, TRAIN, EVALUATE, such as PREPARE="workers=16" TRAIN="trainer.steps=1000"

check_grid

shards() {
    $PYTHON "$here/scripts/prepare_data.py" source=grid "source.root=$GRID" "source.protocol=$PROTOCOL" \
        "source.speakers=$SPEAKERS" features=grid "${pictures[@]}" "output=$SHARDS" "reuse=$SHARDS" ${PREPARE:-} "$@"
}

lags_are_missing() { [ "$LAGS" != null ] && ! [ -f "$LAGS" ]; }

prepare() { if ! [ -d "$TOKENIZER/release" ] || lags_are_missing; then shards stages.rvq.use=false; fi; }

tokenizer() {
    if [ -d "$TOKENIZER/release" ]; then echo "$TOKENIZER/release is there"; return; fi
    if [ "$SIZE" = cpu ]; then
        $PYTHON "$here/scripts/make_synthetic_corpus.py" --out "$SPEECH/synthetic" --version 3 --clips 1500 --test-clips 60
        local known="${SPEAKERS//[\[\]]/}" # without brackets
        local unknown="${NEW_SPEAKERS//[\[\]]/}"
        $PYTHON "$here/scripts/make_speech_corpus.py" --out "$SPEECH" --grid "$GRID" --speakers "$known" \
            --new-speakers "$unknown" --prompts "$PROMPTS" --synthetic "$SPEECH/synthetic" --synthetic-clips 1500
        $PYTHON "$here/train.py" experiment=rvq_speech "data.corpus=$SPEECH" "run=$TOKENIZER" ${TOKENIZE:-}
        return
    fi
    $PYTHON "$here/train.py" experiment=rvq_grid "data.root=$SHARDS" "data.held_out=[val]" "run=$TOKENIZER" ${TOKENIZE:-}
}

tokens() {
    if lags_are_missing; then
        [ -d "$SHARDS" ] || shards stages.rvq.use=false
        $PYTHON "$here/scripts/measure_lags.py" "$SHARDS" "$GRID" "$LAGS"
    fi
    shards "stages.rvq.codec=$TOKENIZER/release" "source.lags=$LAGS"
}

train() {
    if [ -d "$RUN/release" ]; then echo "$RUN/release is there"; return; fi
    local call=("$here/train.py" "experiment=$name" "data.root=$SHARDS" "data.corpus=$GRID" "task.codec=$TOKENIZER/release")
    local start=()
    if [ "$SIZE" = cpu ]; then # the lip encoder alone first: it takes most of the steps and a third of a step's time
        if [ ! -d "$RUN-lips/release" ]; then
            $PYTHON "${call[@]}" \
                "run=$RUN-lips" "task.frozen=[model,identity,expression]" trainer.steps=1600 trainer.lr=1.2e-3 ${TRAIN:-}
        fi
        start=("init=$RUN-lips/release")
    fi
    $PYTHON "${call[@]}" "run=$RUN" "${start[@]}" ${TRAIN:-}
}

# Write a manifest of the test split of the speakers $1, or of all their sentences if $2 is "all".
manifest() {
    $PYTHON - "$GRID" "$PROTOCOL" "$1" "$2" <<'EOF'
import json
import sys
from pathlib import Path

from corpora.preparation.sources_grid import grid

root, protocol, speakers, wanted = sys.argv[1:]
chosen = None if speakers == "null" else [name.strip() for name in speakers.strip("[]").split(",")]
source = grid(root, protocol=protocol, speakers=chosen)
splits = source.splits if wanted == "all" else ["test"]
for clip in (clip for split in splits for clip in source.clips(split)):
    path = str((Path(root) / clip.video).resolve())
    print(json.dumps({"id": clip.key, "text": clip.text, "speaker": clip.speaker, "reference": path, "video": path}))
EOF
}

score() { # $1: name of the manifest and of the report's folder
    $PYTHON "$here/scripts/evaluate.py" table=grid model=hicodit "generate.weights=$RUN/release" \
        "generate.codec=$TOKENIZER/release" "manifest=$REPORT/$1.jsonl" "downloads=$DOWNLOADS" "output=$REPORT/$1" ${EVALUATE:-}
}

evaluate() {
    mkdir -p "$REPORT"
    manifest "$SPEAKERS" test >"$REPORT/test.jsonl"
    score test
    if [ -n "$NEW_SPEAKERS" ]; then
        manifest "$NEW_SPEAKERS" all >"$REPORT/new.jsonl"
        score new
    fi
}

run_steps "prepare tokenizer tokens train evaluate" "$@"
