#!/bin/sh
# Run a stage on a TPU slice of a GKE cluster that XPK made. --dry-run as the first argument shows the call.
#     NAME=mim IMAGE=REGISTRY/beitv2:tpu CLUSTER=pod ZONE=us-west4-a TYPE=v5litepod-256 STORAGE=runs \
#         sh launch/gke/xpk.sh --config=configs/mim.py --workdir=/runs/mim
# STORAGE: what `xpk storage attach` named; the workdir lies on it. RESTARTS: how often at most [100].
cd "$(dirname "$0")/../.." || exit 1
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1 && shift; fi
: "${NAME:?a name for the run}" "${IMAGE:?an image of launch/docker}" "${CLUSTER:?}" "${ZONE:?}" "${STORAGE:?}"
case ${TYPE:?such as v5litepod-256, v6e-256, v5p-128, v4-64} in
v4-*) CHIP=v4 ;;
v5litepod-*) CHIP=v5e ;;
v5p-*) CHIP=v5p ;;
v6e-*) CHIP=v6e ;;
*) echo "Error: TYPE=$TYPE is not known. Instead: v4-*, v5litepod-*, v5p-* or v6e-*." >&2 && exit 2 ;;
esac
. launch/common.sh
# XPK starts again by itself after a preemption and on codes from 127; 75 says that the run saved and wants to go on
run xpk workload create --workload="$NAME" --cluster="$CLUSTER" --zone="$ZONE" --tpu-type="$TYPE" \
    --docker-image="$IMAGE" --storage="$STORAGE" --max-restarts="${RESTARTS:-100}" --restart-on-exit-codes=75 \
    --termination-grace-period-seconds=120 \
    --command="cd /opt/beitv2_jax && CHIP=$CHIP exec sh launch/local.sh $(quoted "$@")"
