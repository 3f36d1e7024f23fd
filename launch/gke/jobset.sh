#!/bin/sh
# Run a stage on GKE as a JobSet: all machines of one TPU slice, or several machines with 8 GPUs, restarted together.
# --dry-run as the first argument prints the YAML that would be applied.
#     export NAME=mim CLAIM=runs
#     IMAGE=REGISTRY/beitv2:tpu CHIP=v5e TOPOLOGY=8x8 sh launch/gke/jobset.sh --config=... --workdir=/runs/mim
#     IMAGE=REGISTRY/beitv2:cuda CHIP=h100 HOSTS=4 sh launch/gke/jobset.sh --config=... --workdir=/runs/mim
# CLAIM: a ReadWriteMany volume claim, mounted at /runs in every pod. RESTARTS: how often at most [100].
# SPOT=false: no spot machines. kubectl must be connected to a cluster with the JobSet controller.
cd "$(dirname "$0")/../.." || exit 1
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1 && shift; fi
. launch/common.sh
: "${NAME:?a name for the run}" "${IMAGE:?an image of launch/docker}" "${CLAIM:?a volume claim for the workdir}"
kind=gpu
case ${CHIP:-} in
v4) kind=tpu accelerator=tpu-v4-podslice ;;
v5e) kind=tpu accelerator=tpu-v5-lite-podslice ;;
v5p) kind=tpu accelerator=tpu-v5p-slice ;;
v6e) kind=tpu accelerator=tpu-v6e-slice ;;
a100) accelerator=nvidia-a100-80gb ;;
h100) accelerator=nvidia-h100-80gb ;;
h200) accelerator=nvidia-h200-141gb ;;
*) echo "Error: CHIP is '${CHIP:-}'. Instead: v4, v5e, v5p, v6e, a100, h100 or h200." >&2 && exit 2 ;;
esac
if [ "$kind" = tpu ]; then
    : "${TOPOLOGY:?chips of the slice, such as 8x8 or 4x4x8}"
    # four chips belong to a machine, wherever a slice has more than one machine
    HOSTS=$(($(echo "$TOPOLOGY" | tr x '*') / 4))
    [ "$HOSTS" -gt 1 ] || { echo "Error: TOPOLOGY=$TOPOLOGY is one machine. Instead: 8 chips or more." >&2 && exit 2; }
fi

# the arguments as YAML strings: as in JSON, in double quotes
args=
for argument; do
    args="$args${args:+, }\"$(printf %s "$argument" | sed 's/[\\"]/\\&/g')\""
done
# fill KEY VALUE: put the value where ${KEY} stands in the template
fill() { sed "s|\${$1}|$(printf %s "$2" | sed 's/[\\&|]/\\&/g')|g"; }
yaml=$(fill NAME "$NAME" <"launch/gke/$kind.yaml" | fill IMAGE "$IMAGE" | fill CLAIM "$CLAIM" | fill CHIP "$CHIP" |
    fill ACCELERATOR "$accelerator" | fill TOPOLOGY "${TOPOLOGY:-}" | fill HOSTS "${HOSTS:-1}" |
    fill RESTARTS "${RESTARTS:-100}" | fill ARGS "$args")
if [ "${SPOT:-true}" = false ]; then
    # machines that are not spot have no such label
    yaml=$(printf "%s\n" "$yaml" | sed '/nodeSelector/,/tolerations/ {/gke-spot/d}')
fi
if [ -n "$DRY_RUN" ]; then
    printf "%s\n" "$yaml"
else
    printf "%s\n" "$yaml" | kubectl apply -f -
fi
