#!/bin/sh
# Run a stage or a pipeline on this machine, in an environment that is made on the first call:
#     sh launch/local.sh --config=configs/quickstart.py --workdir=runs/quickstart
# VENV=DIR chooses the environment, PYTHON=EXE the interpreter it is made with, EXTRAS=cuda or tpu the accelerator.
cd "$(dirname "$0")/.." || exit 1
. launch/venv.sh
exec "$VENV_PYTHON" -m beitv2_jax.main "$@"
