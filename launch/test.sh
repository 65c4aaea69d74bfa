#!/usr/bin/env bash
# Sets up .venv, then runs ruff, mypy and all tests. What was skipped, and why, stands at the end.
#
#   ./launch/test.sh                          everything
#   ./launch/test.sh tests/unit -k search     further arguments go to pytest
set -euo pipefail

OTHER_MEGATRON_CORE=0.18.2 # tested beside the version that launch/requirements.txt pins

cd "$(dirname "${BASH_SOURCE[0]}")/.."
./launch/environment.sh
export PATH="$PWD/.venv/bin:$PATH"

export MEGATRON_CORE_OTHER="$PWD/.venv/megatron-core-$OTHER_MEGATRON_CORE"
if [[ ! -d "$MEGATRON_CORE_OTHER" ]]; then
    partial="$MEGATRON_CORE_OTHER.$$"
    python -m pip install --no-deps --target "$partial" "megatron-core==$OTHER_MEGATRON_CORE"
    mv "$partial" "$MEGATRON_CORE_OTHER"
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
status=0
ruff check . || status=1
mypy || status=1
python -m pytest -rs "$@" || status=1
exit "$status"
