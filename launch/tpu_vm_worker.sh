#!/bin/sh
# One worker of a Cloud TPU slice; launch/tpu_vm.sh copies the repository there and calls this:
#     sh launch/tpu_vm_worker.sh install
#     sh launch/tpu_vm_worker.sh run ARGUMENTS_OF_MAIN...
cd "$(dirname "$0")/.." || exit 1
export VENV="$HOME/venv" EXTRAS=tpu
uv=$HOME/.local/bin/uv

# maintenance and preemption are announced in the metadata of the machine, not by a signal: make one of their change
notices() {
    for key in maintenance-event preempted; do
        curl -sfm 5 -H 'Metadata-Flavor: Google' "metadata.google.internal/computeMetadata/v1/instance/$key" && echo
    done
}
heed_notices() {
    before=$(notices) && while sleep "${POLL:-5}"; do
        now=$(notices) && [ "$now" != "$before" ] && echo "signalled by the machine: $now" && kill "$(cat run.pid)" && return
    done
}

case ${1:-} in
install)
    # the machine images bring Python 3.10
    [ -x "$uv" ] || python3 -m pip install --quiet --user uv || exit 1
    "$uv" python install --quiet 3.12 || exit 1
    PYTHON=$("$uv" python find 3.12) || exit 1
    export PYTHON
    . launch/venv.sh
    ;;
run)
    shift
    # a run that a lost connection left behind still holds the chips: ask it to save, then end it
    if former=$(cat run.pid 2>/dev/null) && kill "$former" 2>/dev/null; then
        seconds=120
        while kill -0 "$former" 2>/dev/null && [ "$seconds" -gt 0 ]; do
            sleep 1
            seconds=$((seconds - 1))
        done
        kill -KILL "$former" 2>/dev/null
    fi
    heed_notices &
    heeding=$!
    # `exec` twice (here and in local.sh): the number of this shell becomes that of the program
    {
        sh -c 'echo $$ >run.pid; exec sh launch/local.sh --distributed "$@"' run "$@"
        echo $? >run.code
    } 2>&1 | tee "$HOME/run.log"
    kill "$heeding" 2>/dev/null
    exit "$(cat run.code)"
    ;;
*)
    echo "Error: '${1:-}' is no command of a worker. Instead: install, or run ARGUMENTS." >&2
    exit 2
    ;;
esac
