"""Megatron-LM's own recipes, made small enough for a few processes on a CPU.

A recipe is a ``model_config.yaml`` of the checkout's functional tests. :func:`shrunk` keeps what it
computes and how it is sharded, and makes sizes small, times short and data up. What it leaves out
are :data:`KERNELS` and what lies :data:`ELSEWHERE`; :func:`dropped` lists it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_sharpness.megatron.cpu import REQUIRED_FLAGS

WORDS = 127
ITERATIONS = 4

#: A recipe's flags as Megatron's own shell script reads them: ``true`` is a flag without a value.
Flags = dict[str, str]

#: Folder of recipes → the scripts that train its model, by where checkouts have them.
SCRIPTS = {
    "bert": ("pretrain_bert.py", "examples/bert/pretrain_bert.py"),
    "t5": ("pretrain_t5.py", "examples/t5/pretrain_t5.py"),
    "gpt": ("pretrain_gpt.py",),
    "moe": ("pretrain_gpt.py",),
    "mixtral": ("pretrain_gpt.py",),
    "hybrid": ("pretrain_hybrid.py", "pretrain_mamba.py"),
    "nemotron": ("pretrain_hybrid.py", "pretrain_mamba.py"),
    "mimo": ("examples/mimo/train.py",),
    "multimodal-llava": ("pretrain_vlm.py",),
}

#: What is not on a CPU, by the flag that asks for it: said of a recipe that does not train here.
NOT_HERE = {
    "--fp8-format": "fp8 needs Transformer Engine",
    "--fp4-format": "fp4 needs Transformer Engine",
    "--tp-comm-overlap": "overlapped tensor parallelism needs Transformer Engine",
    "--moe-flex-dispatcher-backend": "a kernel library dispatches the tokens",
    "--moe-enable-deepep": "a kernel library dispatches the tokens",
    "--export-te-mcore-model": "distillation needs ModelOpt",
    "--export-kd-cfg": "distillation needs ModelOpt",
    "--sft": "its data needs a tokenizer that is not in the checkout",
    "--hybrid-layer-pattern": "Mamba layers need a kernel library",
    "--hybrid-override-pattern": "Mamba layers need a kernel library",
    "--dataset-provider": "its data loader is another library's",
}

#: Flags that say which kernel computes something, or how fast, but not what.
KERNELS = {flag for flag, *_ in REQUIRED_FLAGS} | {
    "--attention-backend", "--use-flash-attn", "--no-bias-gelu-fusion", "--moe-grouped-gemm",
    "--moe-permute-fusion", "--moe-router-fusion", "--cross-entropy-loss-fusion",
    "--cross-entropy-fusion-impl", "--te-rng-tracker", "--use-transformer-engine-op-fuser",
    "--use-fused-weighted-squared-relu", "--disable-gloo-process-groups", "--delay-wgrad-compute",
    "--high-priority-stream-groups", "--defer-embedding-wgrad-compute", "--wgrad-deferral-limit",
    "--moe-use-legacy-grouped-gemm", "--fused-linear-cross-entropy", "--async-strategy",
}  # fmt: skip

#: What is on NVIDIA's machines, and how long it trains there.
ELSEWHERE = {
    "--load", "--pretrained-checkpoint", "--use-checkpoint-args", "--auto-detect-ckpt-format",
    "--data-path", "--per-split-data-args-path", "--data-cache-path", "--split", "--vocab-file",
    "--merge-file", "--tokenizer-model", "--tiktoken-pattern", "--vocab-size",
    "--make-vocab-size-divisible-by", "--wandb-project", "--wandb-entity", "--wandb-exp-name",
    "--wandb-save-dir", "--exit-interval", "--exit-duration-in-mins", "--rampup-batch-size",
    "--step-batch-size-schedule", "--eval-global-batch-size", "--save-retain-interval",
    "--tensorboard-dir", "--use-checkpoint-opt_param-scheduler",
    "--override-opt_param-scheduler", "--dist-ckpt-strictness", "--ckpt-fully-parallel-load",
    "--finetune", "--no-load-optim", "--legacy-tokenizer", "--log-energy",
    "--fim-data", "--fim-rate", "--fim-spm-rate",
}  # fmt: skip

#: Sizes, each at most this.
SIZES = {
    "--num-layers": 4, "--encoder-num-layers": 4, "--decoder-num-layers": 4, "--hidden-size": 32,
    "--num-attention-heads": 4, "--num-query-groups": 2, "--kv-channels": 8,
    "--ffn-hidden-size": 32, "--seq-length": 32, "--encoder-seq-length": 32,
    "--decoder-seq-length": 16, "--max-position-embeddings": 32, "--micro-batch-size": 1,
    "--log-interval": 1, "--eval-iters": 1, "--eval-interval": 2,
    "--save-interval": 2, "--lr-decay-iters": 8, "--lr-warmup-iters": 1, "--manual-gc-interval": 2,
    "--check-weight-hash-across-dp-replicas-interval": 2, "--num-experts": 4,
    "--moe-router-topk": 2, "--moe-router-num-groups": 2, "--moe-router-group-topk": 1,
    "--moe-ffn-hidden-size": 32,
    "--moe-shared-expert-intermediate-size": 32, "--q-lora-rank": 16, "--kv-lora-rank": 16,
    "--qk-head-dim": 8, "--qk-pos-emb-head-dim": 8, "--v-head-dim": 8, "--mtp-num-layers": 1,
    "--mup-base-hidden-size": 16, "--tensor-model-parallel-size": 2,
    "--pipeline-model-parallel-size": 2, "--context-parallel-size": 2,
    "--expert-model-parallel-size": 2, "--img-h": 56, "--img-w": 56, "--dataloader-seq-length": 32,
    "--expert-tensor-parallel-size": 2, "--num-virtual-stages-per-pipeline-rank": 2,
    "--num-layers-per-virtual-pipeline-stage": 1, "--lr-warmup-samples": 0, "--num-workers": 0,
    "--microbatch-group-size-per-virtual-pipeline-stage": 2, "--recompute-num-layers": 1,
    "--decoder-first-pipeline-num-layers": 2, "--decoder-last-pipeline-num-layers": 2,
    "--linear-key-head-dim": 8, "--linear-value-head-dim": 8, "--linear-num-key-heads": 2,
    "--linear-num-value-heads": 4, "--dsa-indexer-head-dim": 8, "--dsa-indexer-n-heads": 2,
    "--dsa-indexer-topk": 8, "--mamba-num-heads": 4, "--mamba-head-dim": 8, "--moe-latent-size": 16,
}  # fmt: skip

DATA = {"--tokenizer-type": "NullTokenizer", "--vocab-size": str(WORDS), "--split": "80,10,10"}

#: What shards a model over data-parallel ranks, of which there are two then. Small shards that are
#: empty on a rank cannot be saved by Megatron, so that nothing is saved.
FULLY_SHARDED = {"--use-megatron-fsdp", "--use-torch-fsdp2"}

#: Has Megatron find an error that it has put in itself, in the second step, and end with a code.
STOPS_ITSELF = "--error-injection-rate"

#: Models that learn to fill in masked words.
MASKED = ("bert", "t5")


@dataclass
class Recipe:
    """One ``model_config.yaml``."""

    name: str
    model: str
    flags: Flags
    environment: dict[str, str]
    trains: bool

    @property
    def title(self) -> str:
        return f"{self.model}/{self.name}"


def recipes(checkout: Path) -> list[Recipe]:
    cases = checkout / "tests" / "functional_tests" / "test_cases"
    found = []
    for path in sorted(cases.glob("*/*/model_config.yaml")):
        config = yaml.safe_load(path.read_text())
        flags = {name: _text(value) for name, value in (config.get("MODEL_ARGS") or {}).items()}
        trains = config.get("MODE", "pretraining") == "pretraining"
        environment = {name: str(value) for name, value in config["ENV_VARS"].items()}
        found.append(Recipe(path.parent.name, path.parent.parent.name, flags, environment, trains))
    return found


def trainings(checkout: Path) -> list[Recipe]:
    """Those that train a model on batches: not those that generate text, or convert."""
    return [
        recipe
        for recipe in recipes(checkout)
        if recipe.trains and recipe.flags and "--perform-rl-step" not in recipe.flags
    ]


def dropped(recipe: Recipe) -> dict[str, list[str]]:
    """Flags that the small recipe does without, by why."""
    gone = recipe.flags.keys() - shrunk(recipe).keys()
    return {
        "kernels": sorted(gone & KERNELS),
        "elsewhere": sorted(gone & ELSEWHERE - KERNELS),
        "cannot be saved so small": sorted(gone - ELSEWHERE - KERNELS),
    }


def _text(value: Any) -> str:
    text = str(value).strip().replace("${REPEAT}", "1")
    return text.lower() if isinstance(value, bool) else text


def shrunk(recipe: Recipe) -> Flags:
    """The same recipe on few processes, of little width and depth, on made-up data."""
    flags = {
        name: str(min(_number(value), SIZES[name])) if name in SIZES else value
        for name, value in recipe.flags.items()
        if name not in KERNELS | ELSEWHERE
    }
    if "--account-for-embedding-in-pipeline-split" in flags:
        flags["--num-layers"] = "6"  # the embedding and the loss count as one each
    if "--fp16" in flags:
        flags["--initial-loss-scale"] = "4096"  # it would fall for longer than this trains
    if {"--use-tp-pp-dp-mapping", "--expert-tensor-parallel-size"} <= set(flags):
        # There Megatron wants as many replicas of the experts as of the rest.
        sharing = size(flags, "tensor-model") * size(flags, "context")
        flags["--expert-tensor-parallel-size"] = str(sharing // size(flags, "expert-model"))
    experts = "m" if "--mtp-num-layers" in flags else ""
    patterns = {
        "--pipeline-model-parallel-layout": f"Et|t|t|t{experts}L",
        "--moe-layer-freq": f"([0]*1+[1]*{int(flags.get('--num-layers', 4)) - 1})",
        "--hierarchical-context-parallel-sizes": "[2 1]",
    }
    flags |= {name: value for name, value in patterns.items() if name in flags}
    if FULLY_SHARDED & set(flags):
        for name in ("--save", "--save-interval", "--async-save"):
            flags.pop(name, None)
    if "--save" in flags:
        flags["--save"] = "checkpoints"
    batch = 2 * data_parallel(flags)
    lengths = {
        "--train-iters": ITERATIONS,
        "--train-samples": ITERATIONS * batch,
        "--lr-decay-samples": 8 * batch,
        "--lr-wsd-decay-samples": 2 * batch,
    }
    flags |= {name: str(number) for name, number in lengths.items() if name in flags}
    flags["--global-batch-size"] = str(batch)
    return flags | DATA | ({} if recipe.model in MASKED else {"--mock-data": "true"})


def _number(value: str) -> int:
    return int(float(value))


def size(flags: Flags, kind: str, otherwise: int = 1) -> int:
    return int(flags.get(f"--{kind}-parallel-size", otherwise))


def interval(flags: Flags) -> int:
    """Measure at every second step, so that a step and an evaluation follow, and a save on both."""
    return 1 if STOPS_ITSELF in flags else 2


def model_parallel(flags: Flags) -> int:
    return size(flags, "tensor-model") * size(flags, "pipeline-model") * size(flags, "context")


def processes(flags: Flags) -> int:
    """As few as its parallel sizes allow, in two replicas where that makes four at most."""
    expert_tensor = size(flags, "expert-tensor", size(flags, "tensor-model"))
    experts = size(flags, "expert-model") * expert_tensor * size(flags, "pipeline-model")
    least = max(experts, model_parallel(flags))
    several = int(flags.get("--num-distributed-optimizer-instances", 1)) > 1
    return least * (2 if several or FULLY_SHARDED & set(flags) or least <= 2 else 1)


def data_parallel(flags: Flags) -> int:
    return processes(flags) // model_parallel(flags)


def command_line(flags: Flags) -> list[str]:
    parts = []
    for name, value in flags.items():
        if value == "true":
            parts += [name]
        elif value.startswith("["):
            parts += [name, *value.strip("[]").split()]
        else:
            parts += [name, value]
    return parts


def alike(recipes: list[Recipe]) -> list[list[Recipe]]:
    """Those together that are the same once they are small, but for numbers such as a rate."""
    groups = defaultdict(list)
    for recipe in recipes:
        flags = shrunk(recipe)
        kept = (item for item in flags.items() if item[0] in SIZES or not _is_number(item[1]))
        groups[SCRIPTS.get(recipe.model), frozenset(flags), frozenset(kept)].append(recipe)
    return list(groups.values())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
