#!/usr/bin/env bash
# Talker-T2AV for portraits and human voices: GRID=/data/grid bash scripts/recipes/talker_real.sh [STEP ...]
# Steps, in this order: corpora shards speech both measure; without any, all of them. Each continues where it stopped.
set -euo pipefail
source "$(dirname "$0")/steps.sh"

GRID="${GRID:-/data/grid}"                  # folders s1, s2, ... of GRID (CC BY 4.0)
SPOKEN="${SPOKEN:-data/synthetic_3}"        # synthetic corpus, version 3: speech alone
DRAWN="${DRAWN:-data/synthetic_2}"          # synthetic corpus, version 2: cartoon faces that speak
RECORDINGS="${RECORDINGS:-}"                # CSV of more speech of people, see make_voice_corpus.py --recordings
VOICES="${VOICES:-data/voices}"             # speech of people, of flite's voices, and of SPOKEN, with its text
FACES="${FACES:-data/faces}"                # people and cartoon faces that speak, with the text
SPEECH="${SPEECH:-runs/talker_real_speech}" # run of the first stage
RUN="${RUN:-runs/talker_real}"
HELD_OUT="${HELD_OUT:-s31 s32 s33 s34}"     # who is measured on
REPORTS="${REPORTS:-outputs/portraits}"     # manifests and tables
# Further settings of each step: SHARDS, TRAIN_SPEECH, TRAIN_BOTH, MEASURE, such as TRAIN_BOTH="trainer.steps=1000"

check_grid

codecs=(stages.speech.codec="$here/assets/whisperx_vae_speech" stages.speaker.encoder="$here/assets/voice_tiny"
    stages.ge2e.use=false stages.rvq.use=false workers=2)

corpora() {
    if [ ! -f "$SPOKEN/train.jsonl" ]; then
        $PYTHON "$here/scripts/make_synthetic_corpus.py" --version 3 --out "$SPOKEN" --clips 1500 --test-clips 60
    fi
    if [ ! -f "$DRAWN/train.jsonl" ]; then
        $PYTHON "$here/scripts/make_synthetic_corpus.py" --version 2 --out "$DRAWN" --clips 700 --test-clips 200
    fi
    if [ ! -f "$VOICES/corpus.json" ]; then
        $PYTHON "$here/scripts/make_voice_corpus.py" --out "$VOICES" --grid "$GRID" --flite 175 --synthetic "$SPOKEN" \
            --synthetic-clips 1400 ${RECORDINGS:+--recordings "$RECORDINGS"}
    fi
    if [ ! -f "$FACES/corpus.json" ]; then
        $PYTHON "$here/scripts/make_voice_corpus.py" --out "$FACES" --grid "$GRID" --pictures 1000 --synthetic "$DRAWN"
    fi
}

shards() {
    $PYTHON "$here/scripts/prepare_data.py" source.root="$VOICES" output="$VOICES/shards/talker" \
        reuse="$VOICES/shards/talker" "${codecs[@]}" ${SHARDS:-}
    $PYTHON "$here/scripts/prepare_data.py" source.root="$FACES" source.all_symbols=true \
        output="$FACES/shards/talker" reuse="$FACES/shards/talker" stages.motion.crop=centre \
        stages.motion.codec="$here/assets/lia_x_real" stages.face.use=false stages.crops.use=false \
        stages.expression.use=false "${codecs[@]}" ${SHARDS:-}
}

speech() {
    if [ -d "$SPEECH/release" ]; then echo "$SPEECH/release is there"; return; fi
    $PYTHON "$here/train.py" experiment=talker_real "data.corpus=$FACES" "data.speech=$VOICES" "data.tasks=[tts]" \
        task.head_fraction=0.5 trainer.batch_size=32 trainer.steps=1600 trainer.lr=8e-4 trainer.schedule=constant \
        trainer.ema_decay=0.995 "run=$SPEECH" ${TRAIN_SPEECH:-}
}

both() {
    if [ -d "$RUN/release" ]; then echo "$RUN/release is there"; return; fi
    $PYTHON "$here/train.py" experiment=talker_real "data.corpus=$FACES" "data.speech=$VOICES" \
        "init=$SPEECH/release" "run=$RUN" ${TRAIN_BOTH:-}
}

# table MODE MANIFEST METRICS [SETTING ...]: a row group of the table of portraits in docs/results.md
table() {
    $PYTHON "$here/scripts/evaluate.py" table=talker model=talker_t2av "generate.mode=$1" \
        "generate.weights=$RUN/release" "manifest=$REPORTS/$2.jsonl" "metrics=[$3]" "output=$REPORTS/$1" \
        "record=$REPORTS/$1" "${@:4}" ${MEASURE:-}
}

measure() {
    $PYTHON "$here/scripts/make_portrait_manifests.py" --grid "$GRID" --people $HELD_OUT --out "$REPORTS"
    table tts sentences per,speaker_similarity,dnsmos,ends_in_time,ends_cut,runs_away \
        ++protocol.speaker_similarity=ge2e ++protocol.dnsmos=p835
    table t2av sentences synchrony,synchrony_late ++protocol.synchrony=landmarks
    table a2v clips mouth_opening,synchrony,synchrony_late ++protocol.synchrony=landmarks ++protocol.mouth_opening=landmarks
    table v2a clips wer ++protocol.wer=grammar "grammar=$here/assets/grid_recogniser/grammar.jsgf"
}

run_steps "corpora shards speech both measure" "$@"
