#!/bin/sh
# Run a stage on a Cloud TPU slice: ask for one (queued resource), wait, install and run on all workers, fetch the log
# (NAME.1.log), delete it; after a preemption ask for another and go on. --dry-run as the first argument shows it all.
#     NAME=mim ZONE=us-west4-a TYPE=v5litepod-64 sh launch/tpu_vm.sh --config=configs/mim.py --workdir=/mnt/runs/mim
# SETUP   command for every worker before the run, to mount what holds the workdir:
#         SETUP='mountpoint -q /mnt || sudo mount -t nfs 10.0.0.2:/share /mnt'
# REQUEST flags of the request [--spot]    TRIES runs at most [20]    POLL seconds between two looks [30]
cd "$(dirname "$0")/.." || exit 1
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1 && shift; fi
: "${NAME:?a name for the slice}" "${ZONE:?such as us-west4-a}" "${TYPE:?such as v5litepod-64, v6e-256, v5p-128, v4-64}"
case $TYPE in
v4-*) CHIP=v4 image=tpu-ubuntu2204-base ;;
v5litepod-*) CHIP=v5e image=v2-alpha-tpuv5-lite ;;
v5p-*) CHIP=v5p image=v2-alpha-tpuv5 ;;
v6e-*) CHIP=v6e image=v2-alpha-tpuv6e ;;
*) echo "Error: TYPE=$TYPE is not known. Instead: v4-*, v5litepod-*, v5p-* or v6e-*." >&2 && exit 2 ;;
esac
. launch/common.sh
pack=$(mktemp) && trap 'rm -f "$pack" "$pack.errors"' EXIT || exit 1
left="$NAME may still exist and cost money: gcloud compute tpus queued-resources delete $NAME --force --zone=$ZONE"
trap 'echo "$left" >&2; exit 130' INT TERM

tpus() { run gcloud compute tpus "$@" --zone="$ZONE" --quiet; }
on_all() { tpus tpu-vm ssh "$NAME" --worker=all --command="mkdir -p beitv2_jax && cd beitv2_jax && $1"; }
request() {
    # shellcheck disable=SC2086  # REQUEST is a list of flags
    tpus queued-resources create "$NAME" --node-id="$NAME" \
        --accelerator-type="$TYPE" --runtime-version="$image" ${REQUEST---spot}
}
state() {
    if [ -n "$DRY_RUN" ]; then echo "$shown" && return; fi
    tpus queued-resources describe "$NAME" --format='value(state.state)' 2>"$pack.errors" && return
    if grep -q NOT_FOUND "$pack.errors"; then echo ABSENT; else cat "$pack.errors" >&2 && echo UNKNOWN; fi
}
attempt() {
    tpus tpu-vm scp "$pack" "$NAME:pack.tar.gz" --worker=all &&
        on_all "tar -xzf ../pack.tar.gz && { ${SETUP:-true}; } && sh launch/tpu_vm_worker.sh install" &&
        on_all "CHIP=$CHIP sh launch/tpu_vm_worker.sh run $(quoted "$@")"
}

tar --exclude=__pycache__ -czf "$pack" setup.py pyproject.toml launch configs beitv2_jax || exit 1
shown=ABSENT tries=0 code=1
while [ "$tries" -lt "${TRIES:-20}" ]; do
    case $(state) in
    ABSENT) request && shown=ACTIVE || exit 1 ;;
    UNKNOWN) tries=$((tries + 1)) && sleep "${POLL:-30}" ;;
    ACTIVE)
        tries=$((tries + 1)) code=0 && attempt "$@" || code=$?
        tpus tpu-vm scp "$NAME:run.log" "$NAME.$tries.log" --worker=0 || echo "no log could be fetched" >&2
        case $code in 0 | 2) break ;; esac
        restarts "$code" || [ "$(state)" != ACTIVE ] || break # an error on machines that are all there is our own
        echo "try $tries ended with exit code $code" >&2 && sleep "${POLL:-30}" ;;
    SUSPENDED) tpus queued-resources delete "$NAME" --force || exit 1 ;;
    FAILED) tries=$((tries + 1)) && tpus queued-resources delete "$NAME" --force || exit 1 ;;
    *) sleep "${POLL:-30}" ;; # still waiting for machines, or losing them
    esac
done
[ "$(state)" = ABSENT ] || tpus queued-resources delete "$NAME" --force
exit "$code"
