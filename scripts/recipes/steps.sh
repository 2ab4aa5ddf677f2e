# For the recipes beside this file, which source it. They define a function for each of their steps.

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
            local names=($known)
            local last="${names[-1]}"
            unset "names[-1]"
            local others
            others="$(printf ", %s" "${names[@]}")"
            echo "error: $step is not a step: give ${others:2} or $last" >&2
            exit 2
        fi
        echo "--- $step"
        "$step"
    done
}
