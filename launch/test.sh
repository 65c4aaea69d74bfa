#!/usr/bin/env bash
# Sets up .venv, then runs ruff, mypy and the tests. What was skipped, and why, stands at the end.
#
#   ./launch/test.sh                          what a change waits for
#   ./launch/test.sh --rare                   the slow tests of what rarely changes: other versions,
#                                             trainers, sweeps (tests/conftest.py lists them);
#                                             as root it installs SLURM with apt-get, to test under
#   ./launch/test.sh tests/core -k search     further arguments go to pytest
set -euo pipefail

OTHER_MEGATRON_CORE=0.18.2 # tested beside the version that launch/requirements.txt pins

cd "$(dirname "${BASH_SOURCE[0]}")/.."
chosen="not rare"
if [[ "${1:-}" == --rare ]]; then
    chosen=rare
    shift
fi
./launch/environment.sh
export PATH="$PWD/.venv/bin:$PATH"

# install_beside FOLDER ARGUMENTS: what cannot share an environment with the rest, once
install_beside() {
    local folder="$1" partial="$1.$$"
    shift
    [[ -d "$folder" ]] && return
    python -m pip install --quiet --disable-pip-version-check --no-deps --target "$partial" "$@"
    mv "$partial" "$folder"
}

frameworks=(hf) # which launch/fsdp has models of
if [[ "$chosen" == rare ]]; then
    frameworks=(
        automodel bridge deepspeed hf lightning megatron-fsdp olmo-core optimizers torchtitan trl
    )
    export MEGATRON_CORE_OTHER="$PWD/.venv/megatron-core-$OTHER_MEGATRON_CORE"
    install_beside "$MEGATRON_CORE_OTHER" "megatron-core==$OTHER_MEGATRON_CORE"
fi
export TRAINER_FRAMEWORKS="$PWD/.venv/frameworks"
mkdir -p "$TRAINER_FRAMEWORKS"
for name in "${frameworks[@]}"; do
    pins="launch/frameworks/$name.txt"
    folder="$TRAINER_FRAMEWORKS/$name-$(sha256sum "$pins" | head -c 8)"
    [[ -d "$folder" ]] || echo "installing $name for its tests" >&2
    install_beside "$folder" --requirement "$pins"
    ln -sfn "$folder" "$TRAINER_FRAMEWORKS/$name"
done

# tests/launch/slurm.py starts it, from a configuration of its own.
have() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null; }
if [[ "$chosen" == rare && $EUID -eq 0 ]] && have apt-get && ! { have munged && have slurmctld; }; then
    echo "installing SLURM for its tests" >&2
    {
        timeout 120 apt-get update --quiet=2 &&
            DEBIAN_FRONTEND=noninteractive timeout 600 \
                apt-get install --quiet=2 --yes --no-install-recommends munge slurm-wlm
    } </dev/null >/dev/null 2>&1 || echo "launch/test.sh: apt-get could not install SLURM" >&2
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
status=0
if [[ "$chosen" != rare ]]; then
    ruff check . || status=1
    mypy || status=1
fi
# More test files at a time than cores: most tests wait for processes of their own. Those of the rare
# tests are many. A test takes a third of its timeout at most: there are machines three times slower.
files=3 timeout=600
[[ "$chosen" == rare ]] && files=2 timeout=900
python -m pytest -rs -m "$chosen" --durations 20 --timeout "$timeout" \
    --numprocesses "$files" --dist loadfile --no-loadscope-reorder "$@" || status=1
exit "$status"
