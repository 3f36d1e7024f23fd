# shellcheck shell=sh
# Sourced by the launch scripts, from the repository root: how to show a command instead of running it, and $CHIP.

DRY_RUN=${DRY_RUN:-}

# quoted ARGUMENTS...: print them as a shell would read them
quoted() {
    for argument; do
        case $argument in
        *[!A-Za-z0-9_./:=,@%+-]* | '') printf "'%s' " "$(printf %s "$argument" | sed "s/'/'\\\\''/g")" ;;
        *) printf '%s ' "$argument" ;;
        esac
    done
}

# run COMMAND...: run it, or print it where DRY_RUN is set
run() {
    if [ -n "$DRY_RUN" ]; then
        quoted "$@" && echo
    else
        "$@"
    fi
}

# restarts CODE: whether a run that ended so is to be started again: preempted (75, it saved) or killed by a signal
restarts() {
    [ "$1" -eq 75 ] || [ "$1" -gt 128 ]
}

# CHIP=v5e: the compiler's settings for that chip
if [ -n "${CHIP:-}" ]; then
    if ! [ -f "launch/env/$CHIP.env" ]; then
        echo "Error: there are no settings for CHIP=$CHIP." >&2
        echo "  Instead: one of $(cd launch/env && echo *.env | sed 's/\.env//g'), or no CHIP." >&2
        exit 2
    fi
    # shellcheck source=/dev/null
    . "launch/env/$CHIP.env"
fi
