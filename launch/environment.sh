#!/usr/bin/env bash
# Makes .venv in the checkout, with the versions of launch/requirements.txt and this package.
# Done again with nothing changed it takes a moment.
#
#   PYTHON=/path/to/python ./launch/environment.sh    to choose the interpreter
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
PINS="$ROOT/launch/requirements.txt"
STAMP="$VENV/.installed" # line 1: checkout and Python; line 2: hash of what was installed

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "launch/environment.sh: $1"
    exit 1
}

# megatron-core publishes wheels with its training loop for these versions of Python.
suitable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in [(3, 12), (3, 13)])' \
        >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in python3.12 python3.13 python3 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23].*/bin/python3; do
        if suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}

make_venv() {
    if [[ -n "$python" ]]; then
        say "making $VENV with $("$python" -V) ($python)"
        "$python" -m venv --clear "$VENV" || fail "'$python -m venv' failed (its message is above).
Set PYTHON to another Python 3.12 or 3.13."
    elif command -v uv >/dev/null; then
        say "no Python 3.12 or 3.13 found; fetching one with uv"
        uv venv --clear --seed --python 3.12 "$VENV" || fail "'uv venv --python 3.12' failed (its message is above).
Install Python 3.12 another way and set PYTHON to it."
    else
        fail "found no Python 3.12 or 3.13 with venv: not in PYTHON, on PATH or among pyenv's, and no uv to fetch one.
Install one, for example with
    sudo apt install python3.12-venv        (Ubuntu 24.04)
    pyenv install 3.12
    curl -LsSf https://astral.sh/uv/install.sh | sh
and run this again; or set PYTHON=/path/to/python3.12."
    fi
}

if [[ -n "${PYTHON:-}" ]]; then
    suitable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.12 or 3.13 with venv and ensurepip.
Set PYTHON to one that is, or unset it to have one looked for."
    python="$PYTHON"
elif suitable "$VENV/bin/python"; then
    python="$VENV/bin/python"
else
    python="$(find_python)"
fi

exec 9>"$ROOT/.venv.lock"
flock --nonblock 9 || {
    say "waiting for another installation into $VENV"
    flock 9
}

installed_place="" installed_hash=""
if [[ -e "$STAMP" ]]; then
    { read -r installed_place && read -r installed_hash; } <"$STAMP" || true
fi
place="$ROOT ${python:+$("$python" -V)}"
hash="$(cat "$PINS" "$ROOT/pyproject.toml" | sha256sum)"
[[ "$installed_place" == "$place" && "$installed_hash" == "$hash" ]] && exit 0

if [[ "$installed_place" != "$place" ]]; then
    [[ "$python" == "$VENV/bin/python" ]] && python="$(find_python)" # never clear it from inside
    make_venv
    place="$ROOT $("$VENV/bin/python" -V)"
fi
rm -f "$STAMP"

say "installing launch/requirements.txt into $VENV (the first time several GB, a few minutes)"
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip=("$VENV/bin/python" -m pip install)
"${pip[@]}" --requirement "$PINS" || fail "pip failed (its message is above).
Check network and disk space, then run this again: what was downloaded is kept."
"${pip[@]}" --no-deps --no-build-isolation --editable "$ROOT" ||
    fail "pip could not install the package itself from $ROOT (its message is above)."

printf '%s\n%s\n' "$place" "$hash" >"$STAMP"
