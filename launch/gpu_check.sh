#!/usr/bin/env bash
# Everything that this repository wants to know from a machine with GPUs: tests/gpu, `verify` of the
# paper's GPT in Megatron (bf16, flash attention, and fp8 and CUDA graphs where Transformer Engine is
# there), FSDP2 with torch.compile, the price of a probe, memory, and the GPT's curve.
#
#   ./launch/gpu_check.sh                          eight minutes; a table, and JSON in runs/gpu_check
#   ./launch/gpu_check.sh --out FOLDER --minutes 30
#
# It runs in the environment that trains (PYTHON=…), with torch and pytest; Megatron's parts are left
# out where megatron-core is not there. Without a GPU the same parts run on the CPU, at a small size.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python}"
case " $* " in
    *" --out"*) out=() ;;
    *)
        rm -rf runs/gpu_check
        out=(--out runs/gpu_check)
        ;;
esac
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m benchmarks.gpu_check "${out[@]}" "$@"
