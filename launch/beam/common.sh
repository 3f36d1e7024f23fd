# Sourced by the scripts in this folder: prepare_in EXTRA ARGUMENTS... runs beitv2_jax.data.prepare.beam in the environment
# of launch/venv.sh with that extra; with --dry-run among the arguments it prints the command and does nothing else.

cd "$(dirname "$0")/../.." || exit 1

prepare_in() {
    extra=$1 dry=
    shift
    for argument; do
        shift
        if [ "$argument" = --dry-run ]; then dry=1; else set -- "$@" "$argument"; fi
    done
    if [ -n "$dry" ]; then
        printf '%s' "${VENV:-.venv}/bin/python -m beitv2_jax.data.prepare.beam"
        for argument; do printf " '%s'" "$argument"; done
        echo
        return
    fi
    EXTRAS=${EXTRAS:+$EXTRAS,}$extra
    . launch/venv.sh
    exec "$VENV_PYTHON" -m beitv2_jax.data.prepare.beam "$@"
}

need() {
    eval "value=\${$1:-}"
    [ -n "$value" ] && return
    echo "Error: $1 is not set." >&2
    echo "  Probably: it was left out before the command." >&2
    echo "  Instead:  $1=$2 sh $0 ..." >&2
    exit 2
}
