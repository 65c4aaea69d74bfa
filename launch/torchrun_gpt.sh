#!/usr/bin/env bash
# Trains a model of configs/ with critical sharpness measured, on one node or on several.
#
#   ./launch/torchrun_gpt.sh                                       one node
#   NODES=4 NODE_RANK=0 MASTER_ADDR=node0 ./launch/torchrun_gpt.sh   on each node, with its rank
#   DRY_RUN=1 ./launch/torchrun_gpt.sh                             print the command
#
# Further arguments go to Megatron, after those of the configuration: --lr 1e-3, for example.
# Needs Megatron-LM's own environment (CUDA, Transformer Engine, flash attention) with this package.
set -euo pipefail

CONFIG="${CONFIG:-configs/gpt_12layer_768.args}"
# Data and tokenizer in Megatron's flags. Replace: --data-path PREFIX --tokenizer-type …
DATA="${DATA:---mock-data --tokenizer-type NullTokenizer --vocab-size 50257}"
OUT="${OUT:-runs/$(basename "$CONFIG" .args)}"     # logs and checkpoints, seen by all nodes
EVERY="${EVERY:-100}"                              # measure at every this many iterations
SCRIPT="${SCRIPT:-launch/pretrain_gpt.py}"         # or Megatron-LM's pretrain_gpt.py
BACKEND="${BACKEND:-cuda}"                         # or cpu: processes of the CPU
PYTHON="${PYTHON:-python}"
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
NODES="${NODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
MASTER_ADDR="${MASTER_ADDR:-localhost}"
MASTER_PORT="${MASTER_PORT:-}"                     # 29500 where there are several nodes

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ! -f "$CONFIG" ]]; then
    echo "launch/torchrun_gpt.sh: CONFIG=$CONFIG: no such file; there are" configs/*.args >&2
    exit 1
fi
mapfile -t config < <(sed 's/#.*//' "$CONFIG" | xargs -n 1)
mapfile -t data < <(xargs -n 1 <<<"$DATA")

meeting=(
    --nnodes "$NODES" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}"
)
[[ "$NODES" == 1 && -z "$MASTER_PORT" ]] && meeting=(--standalone) # at any port that is free

command=(
    "$PYTHON" -m torch.distributed.run
    "${meeting[@]}" --nproc-per-node "$GPUS_PER_NODE"
    -m megatron_sharpness.megatron --backend "$BACKEND" "$SCRIPT"
    "${config[@]}" "${data[@]}"
    --save "$OUT/checkpoints" --load "$OUT/checkpoints" --tensorboard-dir "$OUT/tensorboard"
    --measure-critical-sharpness-every "$EVERY" "$@"
)
if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
case " ${command[*]} " in
    *" --use-megatron-fsdp "* | *" --use-torch-fsdp2 "*) ;; # Megatron refuses 1 there
    *) export CUDA_DEVICE_MAX_CONNECTIONS=1 ;; # tensor and sequence parallelism overlap their communication
esac
exec "${command[@]}"
