#!/bin/sh
# Run the tests, in an environment that is made on the first call; arguments go to pytest:
#     sh launch/test.sh tests/config/config_test.py -k steps
# It starts two processes; TEST_PROCESSES=0 starts none beside pytest itself, which --pdb needs.
# VENV=DIR chooses the environment, PYTHON=EXE the interpreter it is made with.
cd "$(dirname "$0")/.." || exit 1
EXTRAS=${EXTRAS:+$EXTRAS,}test
. launch/venv.sh
exec "$VENV_PYTHON" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadscope --no-loadscope-reorder "$@"
