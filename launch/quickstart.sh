#!/usr/bin/env bash
# Trains a small byte-level GPT with the real Megatron-LM on two CPU processes, and measures
# critical sharpness every 10 iterations. Needs no GPU; a few minutes after the first installation.
set -euo pipefail

ITERATIONS=400
WARMUP=80 # the learning rate rises, is stable, and falls
DECAY=100
PEAK_LR=1e-2

cd "$(dirname "${BASH_SOURCE[0]}")/.."
./launch/environment.sh
export PATH="$PWD/.venv/bin:$PATH"

out=runs/quickstart
log=$out/train.log
rm -rf "$out"
mkdir -p "$out"

echo "1/3  Tokenizing Python's language reference and standard library"
python -m megatron_sharpness.cli tokenize "$out/data/python" --python-docs prose code \
    --max-bytes 4000000

echo "2/3  Training with Megatron-LM: tensor parallel on 2 CPU processes (everything: $log)"
echo "     $ITERATIONS iterations, every tenth is shown; the first line takes half a minute"
arguments=(
    --num-layers 4 --hidden-size 128 --num-attention-heads 4
    --seq-length 128 --max-position-embeddings 128 --position-embedding-type rope
    --attention-dropout 0 --hidden-dropout 0
    --tensor-model-parallel-size 2 --sequence-parallel --bf16 --use-distributed-optimizer
    --data-path "$out/data/python" --split '100,0,0' --data-cache-path "$out/data/cache"
    --tokenizer-type NullTokenizer --vocab-size 257 --make-vocab-size-divisible-by 8
    --micro-batch-size 8 --global-batch-size 16 --train-iters "$ITERATIONS"
    --eval-iters 0 --eval-interval "$ITERATIONS"
    --lr "$PEAK_LR" --min-lr 5e-4 --lr-warmup-iters "$WARMUP" --lr-decay-style WSD
    --lr-decay-iters "$ITERATIONS" --lr-wsd-decay-style linear --lr-wsd-decay-iters "$DECAY"
    --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --log-interval 1 --tensorboard-dir "$out/tensorboard" --tensorboard-log-interval 1
    --measure-critical-sharpness-every 10
)
export OMP_NUM_THREADS=1              # two processes share the machine
export CUDA_VISIBLE_DEVICES=          # the demonstration is the CPU one, GPU or not
export CUDA_DEVICE_MAX_CONNECTIONS=1  # Megatron asks for it under tensor parallelism

# Of the log, show every tenth iteration with its measurement, which is logged just before it.
progress='
/^ critical sharpness at iteration/ {
    s/.* status: found \| critical sharpness: ([^ ]+) \| critical learning rate: ([^ ]+) .* evaluations: ([0-9]+) .*/λ_c \1   η_c \2   (\3 forward passes)/
    s/^ critical sharpness.* status: ([^ ]+) .*/not measured: \1/
    h
}
/^ \[.*\] iteration +[0-9]+0\// {
    s/.* iteration +([0-9]+)\/ +([0-9]+) .* learning rate: ([^ ]+) .* lm loss: ([^ ]+) .*/  iteration \1 of \2   loss \4   η \3/
    G
    s/\n/   /p
}
'
if ! python -m torch.distributed.run --standalone --nproc-per-node 2 \
    -m megatron_sharpness.megatron launch/pretrain_gpt.py "${arguments[@]}" 2>&1 |
    tee "$log" | sed -unE "$progress"; then
    echo "launch/quickstart.sh: training failed; $log holds everything. It says:" >&2
    grep -E '(Error|Exception|error): ' "$log" | grep -v ChildFailedError | sort -u | tail -n 10 >&2
    exit 1
fi

echo "3/3  Drawing the curves; the last measurements:"
python -m megatron_sharpness.cli report "$out/tensorboard/critical_sharpness.jsonl" \
    --tensorboard-dir "$out/tensorboard" --out "$out/curves.png"
cat <<END

Figure            $out/curves.png
JSON lines        $out/tensorboard/critical_sharpness.jsonl
TensorBoard logs  $out/tensorboard; to see them:
                  .venv/bin/python -m tensorboard.main --logdir $out/tensorboard
                  and open http://localhost:6006
END
