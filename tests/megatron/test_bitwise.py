"""Training with a measurement every 2 steps ends bit for bit as training without, dropout on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sharpness.core.measurement import OVER
from megatron_sharpness.sweeps.runs import REPORT
from tests.megatron.harness import MODEL, Run, other_data, run

OVERLAP = "--bf16 --overlap-grad-reduce --overlap-param-gather"
SHARDED = (
    "--use-megatron-fsdp --use-distributed-optimizer --ckpt-format fsdp_dtensor "
    "--data-parallel-sharding-strategy"
)
FULLY = f"{SHARDED} optim_grads_params"
FSDP2 = "--use-torch-fsdp2 --untie-embeddings-and-output-weights --ckpt-format torch_dist"
IN_STEP = (
    f"--use-distributed-optimizer {OVERLAP} --overlap-param-gather-with-optimizer-step "
    "--ckpt-format torch --num-layers 4 --pipeline-model-parallel-size 2 "
    "--num-layers-per-virtual-pipeline-stage 1"
)
AWARE = f"--use-distributed-optimizer {OVERLAP} --use-precision-aware-optimizer"
ON_HOST = (
    "--use-distributed-optimizer --bf16 --use-precision-aware-optimizer --optimizer-cpu-offload"
)
MTP = "--mtp-num-layers 1 --position-embedding-type rope"
EXPERTS = "--num-experts 4 --expert-model-parallel-size 2 --disable-bias-linear"
ACTIVATIONS = (
    "--fine-grained-activation-offloading --offload-modules core_attn attn_proj "
    "--min-offloaded-tensor-size 1"
)
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

#: Layout → (processes, flags).
LAYOUTS = {
    "fp32": (1, ""),
    "bf16": (1, "--bf16"),
    "fp16 with skipped steps": (1, "--fp16 --initial-loss-scale 2097152 --hysteresis 1"),
    "sgd": (1, "--optimizer sgd --bf16"),
    "muon": (1, "--optimizer muon --bf16"),
    "muon distributed": (2, f"--optimizer muon --use-distributed-optimizer {OVERLAP}"),
    "muon distributed tp": (2, "--optimizer muon --bf16 --use-distributed-optimizer "
                               "--tensor-model-parallel-size 2"),
    "muon dealt out": (2, "--optimizer muon --bf16 --use-distributed-optimizer "
                          "--no-use-layer-wise-param-layout"),
    "muon dealt out overlap": (2, f"--optimizer muon --use-distributed-optimizer {OVERLAP} "
                                  "--no-use-layer-wise-param-layout"),
    "decoupled lr": (1, "--decoupled-lr 2e-2 --decoupled-min-lr 1e-3 --bf16 "
                        "--untie-embeddings-and-output-weights"),
    "recompute": (1, f"--bf16 {RECOMPUTE}"),
    "no reruns": (1, "--bf16 --rerun-mode disabled"),
    "eval mode": (1, "--bf16 --critical-sharpness-mode eval"),
    "offload": (1, "--bf16 --critical-sharpness-offload cpu"),
    "bisection": (1, "--bf16 --critical-sharpness-method bisection"),
    "distributed optimizer": (2, "--bf16 --use-distributed-optimizer"),
    "distributed optimizer fp32": (2, "--use-distributed-optimizer"),
    "non-distributed optimizer": (2, "--bf16"),
    "overlap": (2, f"--use-distributed-optimizer {OVERLAP}"),
    "overlap in buckets": (2, f"--use-distributed-optimizer {OVERLAP} --ddp-bucket-size 5000"),
    "tp": (2, "--tensor-model-parallel-size 2"),
    "tp with sequence parallelism": (2, "--tensor-model-parallel-size 2 --sequence-parallel --bf16 "
                                        "--use-distributed-optimizer"),
    "pp": (2, "--pipeline-model-parallel-size 2 --bf16"),
    "vpp": (2, "--pipeline-model-parallel-size 2 --num-layers 4 "
               "--num-layers-per-virtual-pipeline-stage 1 --bf16 --use-distributed-optimizer"),
    "ep": (2, "--num-experts 4 --expert-model-parallel-size 2 --moe-aux-loss-coeff 1e-2 "
              "--moe-z-loss-coeff 1e-3 --moe-input-jitter-eps 1e-2 --bf16 "
              "--use-distributed-optimizer"),
    "ep with expert bias": (2, "--num-experts 4 --expert-model-parallel-size 2 --bf16 "
                               "--moe-router-score-function sigmoid "
                               "--moe-router-enable-expert-bias "
                               "--moe-router-bias-update-rate 1e-2"),
    "sinkhorn": (1, "--num-experts 4 --moe-router-load-balancing-type sinkhorn "
                    "--moe-router-topk 1 --disable-bias-linear --bf16"),
    "tp pp": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
                 "--sequence-parallel --bf16 --use-distributed-optimizer"),
    "pp dp overlap": (4, "--pipeline-model-parallel-size 2 --use-distributed-optimizer "
                         f"{OVERLAP}"),
    "instances": (4, f"--use-distributed-optimizer {OVERLAP} "
                     "--num-distributed-optimizer-instances 2"),
    "instances fp32": (4, "--use-distributed-optimizer --overlap-grad-reduce "
                          "--num-distributed-optimizer-instances 2"),
    "gathers in the step": (2, IN_STEP),
    "gathers in the step dp": (4, IN_STEP),
    "fsdp no_shard": (2, f"{SHARDED} no_shard --bf16"),
    "fsdp no_shard overlap": (2, f"{SHARDED} no_shard --bf16 --overlap-grad-reduce"),
    "fsdp optim": (2, f"{SHARDED} optim --bf16"),
    "fsdp optim overlap": (2, f"{SHARDED} optim {OVERLAP}"),
    "fsdp optim_grads": (2, f"{SHARDED} optim_grads --bf16"),
    "fsdp optim_grads overlap": (2, f"{SHARDED} optim_grads {OVERLAP}"),
    "fsdp": (2, f"{FULLY} --bf16"),
    "fsdp fp32": (2, FULLY),
    "fsdp overlap": (2, f"{FULLY} {OVERLAP}"),
    "fsdp double buffers": (2, f"{FULLY} {OVERLAP} --fsdp-double-buffer"),
    "fsdp steps the model's own": (2, f"{FULLY} --overlap-grad-reduce --overlap-param-gather "
                                      "--megatron-fsdp-main-params-dtype auto"),
    "fsdp recompute": (2, f"{FULLY} {OVERLAP} {RECOMPUTE}"),
    "fsdp masters": (2, f"{FULLY} {OVERLAP} --use-precision-aware-optimizer"),
    "fsdp meta device": (2, f"{FULLY} {OVERLAP} --init-model-with-meta-device"),
    "fsdp eval mode": (2, f"{FULLY} {OVERLAP} --critical-sharpness-mode eval"),
    "fsdp offload": (2, f"{FULLY} {OVERLAP} --critical-sharpness-offload cpu"),
    "fsdp ep": (4, f"{FULLY} {OVERLAP} --num-experts 4 --expert-model-parallel-size 2"),
    # It makes the random states of the tensor-parallel ranks one, and dropout with them.
    "fsdp tp": (4, f"{FULLY} {OVERLAP} --tensor-model-parallel-size 2 --sequence-parallel "
                   "--hidden-dropout 0 --attention-dropout 0"),
    "hsdp": (4, f"{FULLY} {OVERLAP} --num-distributed-optimizer-instances 2"),
    "fsdp2": (2, f"{FSDP2} --bf16"),
    "fsdp2 fp32": (2, FSDP2),
    "fsdp2 kept": (2, f"{FSDP2} --bf16 --torch-fsdp2-no-reshard-after-forward"),
    "fsdp2 recompute": (2, f"{FSDP2} --bf16 {RECOMPUTE}"),
    "cp": (2, "--context-parallel-size 2 --bf16"),
    "cp distributed": (4, f"--context-parallel-size 2 --use-distributed-optimizer {OVERLAP}"),
    "cp of four": (4, "--context-parallel-size 4"),
    "cp tp": (4, "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel "
                 "--bf16 --use-distributed-optimizer"),
    "cp pp": (4, f"--context-parallel-size 2 --pipeline-model-parallel-size 2 {OVERLAP} "
                 "--use-distributed-optimizer"),
    "cp ep": (2, f"--context-parallel-size 2 {EXPERTS} --bf16 --use-distributed-optimizer"),
    "cp mtp": (2, f"--context-parallel-size 2 {MTP} --bf16"),
    "cp fsdp": (2, f"--context-parallel-size 2 {FULLY} {OVERLAP}"),
    "mtp": (1, f"{MTP} --bf16"),
    "mtp pp": (2, f"{MTP} --pipeline-model-parallel-size 2 --bf16"),
    "mtp tp": (2, f"{MTP} --tensor-model-parallel-size 2 --sequence-parallel --bf16"),
    "mtp ep": (2, f"{MTP} {EXPERTS} --bf16 --use-distributed-optimizer {OVERLAP}"),
    "masters remain": (2, f"{AWARE} --main-grads-dtype bf16 --exp-avg-dtype bf16 "
                          "--exp-avg-sq-dtype bf16"),
    "masters in fp16": (2, f"{AWARE} --main-params-dtype fp16 --exp-avg-dtype fp16"),
    "masters in fp32": (2, "--use-distributed-optimizer --fp16 --initial-loss-scale 4096 "
                           "--use-precision-aware-optimizer --accumulate-allreduce-grads-in-fp32"),
    "masters tp": (2, "--use-distributed-optimizer --bf16 --use-precision-aware-optimizer "
                      "--tensor-model-parallel-size 2 --sequence-parallel"),
    "masters and copies on the host": (1, "--use-distributed-optimizer --bf16 "
                                          "--use-precision-aware-optimizer "
                                          "--critical-sharpness-offload cpu"),
    "optimizer half on the host": (2, f"{ON_HOST} --optimizer-offload-fraction 0.5"),
    "optimizer on the host": (2, f"{ON_HOST} --optimizer-offload-fraction 1.0 "
                                 "--overlap-cpu-optimizer-d2h-h2d"),
    "ep overlap": (2, f"{EXPERTS} --moe-token-dispatcher-type alltoall --bf16 "
                      "--overlap-moe-expert-parallel-comm --use-distributed-optimizer"),
    "ep overlap sequence parallel": (2, f"{EXPERTS} --moe-token-dispatcher-type alltoall --bf16 "
                     "--overlap-moe-expert-parallel-comm --use-distributed-optimizer "
                     "--tensor-model-parallel-size 2 --sequence-parallel "
                     "--expert-tensor-parallel-size 1"),
    "activations on the host": (1, f"{ACTIVATIONS} --bf16"),
    "activations on the host tp": (2, f"{ACTIVATIONS} --bf16 --tensor-model-parallel-size 2 "
                                      "--num-layers 4 --activation-offload-fraction 0.5"),
    "fp16 cross entropy": (1, "--fp16 --initial-loss-scale 4096 --fp16-lm-cross-entropy"),
    "mtp fp16 scale grows": (1, f"{MTP} --num-experts 4 --disable-bias-linear --fp16 "
                                "--moe-aux-loss-coeff 1e-2 --initial-loss-scale 4096 "
                                "--loss-scale-window 2"),
    "ep few samples": (2, f"{EXPERTS} --moe-aux-loss-coeff 1e-2 --bf16 "
                          "--critical-sharpness-eval-samples 4"),
    "clipped logits": (2, "--bf16 --qk-clip --qk-clip-threshold 0.02 --log-max-attention-logit"),
    "mla": (2, "--bf16 --multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 8 "
               "--qk-pos-emb-head-dim 8 --v-head-dim 8 --position-embedding-type rope "
               "--tensor-model-parallel-size 2"),
    "norms of one more": (2, "--bf16 --apply-layernorm-1p --normalization RMSNorm "
                             "--tensor-model-parallel-size 2 --sequence-parallel"),
    "largest logits": (1, "--bf16 --log-max-attention-logit"),
    "fsdp2 tp": (4, f"{FSDP2} --bf16 --tensor-model-parallel-size 2 --sequence-parallel"),
}  # fmt: skip

#: What every change is tried on: each precision, and each way in which ranks share a model.
COMMON = {
    "fp32", "bf16", "fp16 with skipped steps", "eval mode", "distributed optimizer",
    "overlap in buckets", "muon distributed", "tp with sequence parallelism", "vpp", "ep",
    "fsdp overlap", "fsdp2", "cp", "mtp", "masters remain", "optimizer half on the host",
}  # fmt: skip


def layouts(*names: str) -> list[Any]:
    """Parameters of a test; those that are not common are rare."""
    return [pytest.param(n, marks=() if n in COMMON else pytest.mark.rare) for n in names]


#: The loss scale falls for three steps, and a scheduler that has not moved yet is at zero.
STATUSES = {"fp16 with skipped steps": ["skipped_step", "zero_lr", "found"]}


@pytest.mark.parametrize("layout", layouts(*LAYOUTS))
def test_measured_training_is_bit_for_bit_the_same(layout: str, tmp_path: Path) -> None:
    processes, flags = LAYOUTS[layout]
    plain = run(tmp_path / "plain", flags, processes=processes).expect_success()
    others = f"--critical-sharpness-eval-data sums={other_data(tmp_path)}"
    adam = "--optimizer sgd" not in flags
    others += " --measure-adam-snr" * adam
    measured = run(
        tmp_path / "measured", f"{flags} {others} --critical-sharpness-watch always "
        "--critical-sharpness-parts modules", processes=processes, every=2,
    ).expect_success()  # fmt: skip

    assert len(plain.hashes) == processes
    assert measured.hashes == plain.hashes
    assert measured.training_lines == plain.training_lines
    statuses = [r["status"] for r in measured.records]
    assert [r["iteration"] for r in measured.records] == [2, 4, 6]
    assert statuses == STATUSES.get(layout, ["found"] * 3)
    assert "differs from the training loss" not in measured.output
    # Other data can rise at once, or nearly so for 16 bits: expected answers.
    for own, other in zip(statuses, measured.relative_records, strict=True):
        assert other["batch"] == "sums"
        answers = ("found", "not_descent", "noise_limited") if own == "found" else (own,)
        assert other["status"] in answers
    check_parts(layout, measured, statuses)
    for record in measured.records:
        seen = record["adam_snr"] or {}
        assert bool(seen) == (adam and record["status"] == "found"), measured.output[-3000:]
        # Muon steps the matrices of layers, and Adam the embeddings.
        assert "embedding.word_embeddings.weight" in seen or not seen
        ratios = [kind[over] for kind in seen.values() for over in OVER]
        assert all(ratio is None or 0.0 < ratio < 1e6 for ratio in ratios)


def check_parts(layout: str, measured: Run, statuses: list[str]) -> None:
    """Each part of the model has a record at each measurement, and none has failed."""
    parts = {record["part"] for record in measured.part_records}
    assert {"embeddings", "norms", "attention"} <= parts
    assert ("rest" in parts) == ("mtp" in layout)  # its own projection
    assert len(measured.part_records) == len(parts) * len(statuses)
    for record in measured.part_records:
        own = statuses[record["iteration"] // 2 - 1]
        # Weights before a normalization may grow without end.
        answers = ("found", "not_descent", "noise_limited", "no_upper")
        assert record["status"] in (answers if own == "found" else (own,)), record


@pytest.mark.parametrize(
    "layout",
    layouts("bf16", "distributed optimizer fp32", "overlap in buckets", "tp pp", "vpp",
            "ep with expert bias", "fsdp overlap", "fsdp optim", "fsdp2", "cp tp", "mtp",
            "masters remain", "masters in fp16", "optimizer half on the host"),
)  # fmt: skip
def test_a_frozen_run_leaves_the_model_as_it_was(layout: str, tmp_path: Path) -> None:
    processes, flags = LAYOUTS[layout]
    others = f"--critical-sharpness-eval-data sums={other_data(tmp_path)}"
    still = "--lr 0 --min-lr 0 --moe-router-bias-update-rate 0"
    unmoved = run(tmp_path / "unmoved", f"{flags} {still}", processes=processes).expect_success()
    frozen = run(
        tmp_path / "frozen", f"{flags} {others} --critical-sharpness-frozen 3",
        processes=processes, every=2,
    ).expect_success()  # fmt: skip
    for before, after in zip(unmoved.hashes, frozen.hashes, strict=True):
        for part in (
            "parameters", "main parameters", "buffers", "optimizer", "gradients", "random states",
        ):  # fmt: skip
            assert after[part] == before[part], part
    assert [record["iteration"] for record in frozen.all_records] == [4, 4, 6, 6]
    assert REPORT.search(frozen.output)
    assert {record["status"] for record in frozen.records} == {"found"}


def test_training_whose_batches_grow_is_the_same(tmp_path: Path) -> None:
    samples = MODEL.replace("--train-iters 6", "--train-samples 40").replace(
        "--lr-warmup-iters 2", "--lr-warmup-samples 8"
    ).replace("--global-batch-size 8", "")  # fmt: skip
    tokens = 16 * 32
    growing = f"--bf16 --step-batch-size-schedule '0:4 {tokens}:8'"
    plain, measured = (
        run(tmp_path / str(every), growing, every=every, model=samples).expect_success()
        for every in (0, 2)
    )
    assert measured.hashes == plain.hashes
    assert measured.training_lines == plain.training_lines
    assert [r["consumed_samples"] for r in measured.records] == [8, 16, 32]
    assert [r["tokens"] for r in measured.records] == [4 * 32, 4 * 32, 8 * 32]
