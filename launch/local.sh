#!/bin/sh
# Run a stage or a pipeline on this machine, in an environment that is made on the first call:
#     sh launch/local.sh --config=configs/quickstart.py --workdir=runs/quickstart
# VENV=DIR chooses the environment, PYTHON=EXE the interpreter it is made with, EXTRAS=cuda or tpu the accelerator,
# CHIP=h100 (a file of launch/env) the compiler's settings for it. --dry-run as the first argument shows the commands.
# PROCESSES=4 runs it as so many CPU processes of one run; RESTARTS=3 starts it again so often after a preemption (exit
# code 75) or a death by signal.
cd "$(dirname "$0")/.." || exit 1
if [ "${1:-}" = --dry-run ]; then
    DRY_RUN=1
    shift
fi
. launch/common.sh
if [ -n "$DRY_RUN" ]; then
    VENV_PYTHON=${VENV:-.venv}/bin/python
    echo "# makes ${VENV:-.venv} and installs beitv2_jax${EXTRAS:+[$EXTRAS]} in it, unless that was done"
else
    . launch/venv.sh
fi
set -- -m beitv2_jax.main "$@"
if [ "${PROCESSES:-1}" -gt 1 ] || [ "${RESTARTS:-0}" -gt 0 ]; then
    set -- launch/processes.py "${PROCESSES:-1}" "${RESTARTS:-0}" "$@"
fi
run exec "$VENV_PYTHON" "$@"
