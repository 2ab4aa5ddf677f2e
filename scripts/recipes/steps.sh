# For the recipes beside this file, which source it. They define a function for each of their steps.

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$here:$here/codecs${PYTHONPATH:+:$PYTHONPATH}"
PYTHON="${PYTHON:-python}"

# check_grid: end the recipe unless GRID is a folder with files.
check_grid() {
    if ! compgen -G "$GRID/*" >/dev/null; then
        echo "error: GRID=$GRID is not a folder with files: set GRID to the folder that holds s1, s2, ..." >&2
        exit 2
    fi
}

# run_steps "STEP ..." [CHOSEN ...]: run the chosen steps in their order on the command line; without any, all of them.
run_steps() {
    local known=" $1 "
    shift
    if [ $# = 0 ]; then set -- $known; fi
    local step
    for step in "$@"; do
        if [[ "$known" != *" $step "* || "$step" == *" "* ]]; then
            echo "error: $step is not a step: give one or more of:${known% }" >&2
            exit 2
        fi
        echo "--- $step"
        "$step"
    done
}
