# shellcheck shell=sh
# Sourced by the launch scripts, from the repository root: makes $VENV (default .venv) if there is none and installs the
# project into it, editable, with the extras in $EXTRAS (such as cuda, tpu or test), unless that was done before and
# setup.py has not changed since. Afterwards $VENV_PYTHON runs the project.

VENV=${VENV:-.venv}
VENV_PYTHON=$VENV/bin/python

find_python() {
    for candidate in ${PYTHON:-python3.12 python3.11 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "Error: no Python 3.11 or newer was found (tried: ${PYTHON:-python3.12 python3.11 python3})." >&2
    echo "  Install one, or name it: PYTHON=/path/to/python3.11 sh launch/..." >&2
    return 1
}

make_venv() {
    python=$(find_python) || exit 1
    if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        echo "Error: $python cannot make virtual environments: its venv module is missing." >&2
        echo "  On Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    fi
    echo "Making $VENV with $("$python" --version) ..." >&2
    "$python" -m venv "$VENV" || exit 1
}

install_project() {
    # a stamp per set of extras is written after a complete installation; without extras any of them will do
    extras=$(printf '%s' "${EXTRAS:-}" | tr -c '[:alnum:]' '-')
    if find "$VENV" -maxdepth 1 -name ".installed-${extras:-*}" -newer setup.py -newer pyproject.toml | grep -q .; then
        return
    fi
    echo "Installing beitv2_jax${EXTRAS:+[$EXTRAS]} into $VENV (a minute or two, once) ..." >&2
    # Python writes the bytecode of a module when it is first imported, unless this variable forbids it
    bytecode=--no-compile
    [ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || bytecode=--compile
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check "$bytecode" --editable ".${EXTRAS:+[$EXTRAS]}" ||
        exit 1
    touch "$VENV/.installed-${extras:-none}"
}

[ -x "$VENV_PYTHON" ] || make_venv
install_project
