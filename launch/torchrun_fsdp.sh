#!/usr/bin/env bash
# Trains a model with PyTorch's FSDP2 and critical sharpness measured, on one node or on several.
#
#   ./launch/torchrun_fsdp.sh                                        one node
#   NODES=4 NODE_RANK=0 MASTER_ADDR=node0 ./launch/torchrun_fsdp.sh    on each node, with its rank
#   DRY_RUN=1 ./launch/torchrun_fsdp.sh                              print the command
#   CONFIG= ./launch/torchrun_fsdp.sh --hf-model FOLDER …            no configuration: flags only
#
# Further arguments go to launch/fsdp/train.py, after those of the configuration.
# Needs torch and this package; docs/fsdp.md says what else for which data and model.
set -euo pipefail

CONFIG="${CONFIG-configs/gpt_12layer_768.args}"
# Text that every Python has. Replace: --jsonl FILE…, --hf-dataset NAME, --data-path PREFIX …
DATA="${DATA:---python-docs prose code}"
OUT="${OUT:-runs/fsdp_$(basename "${CONFIG:-model}" .args)}" # logs and checkpoints, seen by all nodes
EVERY="${EVERY:-100}"                              # measure at every this many iterations
PYTHON="${PYTHON:-python}"
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"                # without a GPU, processes of the CPU
NODES="${NODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
MASTER_ADDR="${MASTER_ADDR:-localhost}"
MASTER_PORT="${MASTER_PORT:-}"                     # 29500 where there are several nodes

cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=()
if [[ -n "$CONFIG" ]]; then
    if [[ ! -f "$CONFIG" ]]; then
        echo "launch/torchrun_fsdp.sh: CONFIG=$CONFIG: no such file; there are" configs/*.args >&2
        exit 1
    fi
    mapfile -t config < <(sed 's/#.*//' "$CONFIG" | xargs -n 1)
fi
mapfile -t data < <(xargs -n 1 <<<"$DATA")

meeting=(
    --nnodes "$NODES" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}"
)
[[ "$NODES" == 1 && -z "$MASTER_PORT" ]] && meeting=(--standalone) # at any port that is free

command=(
    "$PYTHON" -m torch.distributed.run
    "${meeting[@]}" --nproc-per-node "$GPUS_PER_NODE"
    launch/fsdp/train.py
    "${config[@]}" "${data[@]}"
    --save "$OUT/checkpoints" --load "$OUT/checkpoints" --tensorboard-dir "$OUT/tensorboard"
    --measure-critical-sharpness-every "$EVERY" "$@"
)
if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
exec "${command[@]}"
