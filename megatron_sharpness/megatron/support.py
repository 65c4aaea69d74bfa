"""What a measurement needs of Megatron, and what it refuses: at start-up, by name."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from megatron.core import package_info

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.megatron import engine

#: Versions that the tests run.
TESTED = ("0.16", "0.17", "0.18", "0.19", "0.20")

_QUANTIZED = "the quantization state changes in every forward pass, so training would change too"
#: Argument → (flag, why it is refused). Each of these was never run with a measurement and could
#: be wrong in silence.
REFUSED: dict[str, tuple[str, str]] = {
    "fp4": ("--fp4-format", _QUANTIZED),
    "te_precision_config_file": ("--te-precision-config-file", _QUANTIZED),
    "kitchen_config_file": ("--kitchen-config-file", _QUANTIZED),
    "kitchen_recipe_number": ("--kitchen-recipe-number", _QUANTIZED),
    "fp8_param_gather": ("--fp8-param-gather", _QUANTIZED),
    "fp4_param_gather": ("--fp4-param-gather", _QUANTIZED),
    "fp4_param": ("--fp4-param-gather", _QUANTIZED),
    "reuse_grad_buf_for_mxfp8_param_ag": ("--reuse-grad-buf-for-mxfp8-param-ag", _QUANTIZED),
    "hybrid_context_parallel": (
        "--hybrid-context-parallel",
        "its data loader hands out micro-batches that cannot be repeated",
    ),
    "perform_rl_step": ("--perform-rl-step", "its batches are rollouts and not micro-batches"),
    "moe_expert_rank_capacity_factor": (
        "--moe-expert-rank-capacity-factor",
        "its runner repeats training passes on its own",
    ),
    "vision_pretraining": (
        "--vision-pretraining",
        "a momentum teacher moves after the optimizer step",
    ),
    "moe_routing_trace_path": ("--moe-routing-trace-path", "probes would be traced as well"),
}


#: Argument → (flag, what it is) of what nobody could run here, and is believed where the run's own
#: first measurement has shown it (:class:`~megatron_sharpness.core.meter.Meter`).
SELF_TESTED: dict[str, tuple[str, str]] = {
    "fp8": ("--fp8-format", "fp8 {fp8_recipe}"),
    "cuda_graph_impl": ("--cuda-graph-impl", "CUDA graphs {cuda_graph_impl}"),
    "enable_cuda_graph": ("--enable-cuda-graph", "CUDA graphs local"),
    "external_cuda_graph": ("--external-cuda-graph", "CUDA graphs transformer_engine"),
    "optimizer_cuda_graph": ("--optimizer-cuda-graph", "CUDA graph of the optimizer"),
}

#: Recipes of fp8 whose state is known.
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def self_tested(args: Any) -> list[str]:
    """The modes of this run that have to pass its self-test."""
    given = vars(args)
    return [what.format(**given) for _, (_, what) in _used(args, SELF_TESTED)]


def self_tested_here(args: Any) -> list[str]:
    """Those of them that this process runs."""
    there = engine.is_there()
    return [mode for mode in self_tested(args) if there or not mode.startswith("fp8")]


def _used(args: Any, table: dict[str, tuple[str, str]]) -> Iterator[tuple[Any, tuple[str, str]]]:
    """Value and row of the arguments in a table that are given."""
    for name, row in table.items():
        value = getattr(args, name, None)
        given = value and value != "none"
        if given or (name == "kitchen_recipe_number" and value is not None):  # 0 is one of them
            yield value, row


def refuse_unsupported(args: Any, *, self_tests: bool = True) -> None:
    """Raise for a configuration that a measurement cannot be trusted in.

    Args:
        args: Megatron's arguments, or what has some of them.
        self_tests: whether the run can test itself.

    Raises:
        InputError: names all flags that cannot be used, their values, the reasons and the remedy.
    """
    tested = " and ".join(f"{flag} {value}" for value, (flag, _) in _used(args, SELF_TESTED))
    measuring = [*refusals(args), *_refusals_of_self_tested(args, self_tests)]
    for owner, refused in (
        ("--measure-critical-sharpness-every", measuring),
        (tested, list(_at_odds_with_a_self_test(args)) if self_tests else []),
    ):
        if refused:
            raise InputError(
                f"{owner} cannot be used with "
                + "; nor with ".join(f"{flag} {value}: {reason}" for flag, value, reason in refused)
                + ". Leave one of the two out."
            )


def refusals(args: Any) -> Iterator[tuple[str, object, str]]:
    """Flag, value and reason of all that cannot be measured with."""
    for value, (flag, reason) in _used(args, REFUSED):
        yield flag, value, reason
    if getattr(args, "gtp_weight_remat_size", 1) > 1:
        yield "--gtp-weight-remat-size", args.gtp_weight_remat_size, "it was never measured"
    if _is_hybrid(args) and not getattr(args, "overlap_grad_reduce", False):
        yield (
            "--num-distributed-optimizer-instances",
            args.num_distributed_optimizer_instances,
            "unless --overlap-grad-reduce is given, Megatron-FSDP does not reduce the gradients "
            "between its instances, so that each trains weights of its own and there is no one θ",
        )


def _refusals_of_self_tested(args: Any, self_tests: bool) -> Iterator[tuple[str, object, str]]:
    """Modes that have to pass a self-test, where there is none or it would not do."""
    if not self_tests:
        for value, (flag, _) in _used(args, SELF_TESTED):
            yield flag, value, "it was never run with a measurement, and could be wrong in silence"
        return
    recipe = getattr(args, "fp8_recipe", None)
    if getattr(args, "fp8", None) and recipe not in RECIPES:
        yield "--fp8-recipe", recipe, f"what it keeps is not known; give one of {RECIPES}"


def _at_odds_with_a_self_test(args: Any) -> Iterator[tuple[str, object, str]]:
    """What a run with modes that have to pass one cannot be measured with."""
    names = ", ".join(self_tested(args))
    if not names:
        return
    if getattr(args, "critical_sharpness_mode", "train") != "train":
        yield (
            "--critical-sharpness-mode",
            args.critical_sharpness_mode,
            f"{names} has to pass a self-test, which compares with the loss of the training pass",
        )
    if getattr(args, "critical_sharpness_frozen", None) is not None:
        yield (
            "--critical-sharpness-frozen",
            args.critical_sharpness_frozen,
            f"{names} has to pass a self-test, which a run that takes its steps back has not",
        )


def _is_hybrid(args: Any) -> bool:
    """Whether several instances of Megatron-FSDP share a training (HSDP)."""
    instances = getattr(args, "num_distributed_optimizer_instances", 1)
    return bool(getattr(args, "use_megatron_fsdp", False)) and instances > 1


def faults_of_megatron(args: Any) -> list[str]:
    """What Megatron itself is known to get wrong in this configuration, measured or not."""
    if not getattr(args, "use_megatron_fsdp", False):
        return []
    found = []
    if _is_hybrid(args) and getattr(args, "outer_dp_sharding_strategy", None) == "optim":
        found.append(
            "--outer-dp-sharding-strategy optim: Megatron-FSDP scales the gradients wrongly, and "
            "the gradient norm is that of others; train with no_shard"
        )
    instances = getattr(args, "num_distributed_optimizer_instances", 1)
    strategy = getattr(args, "data_parallel_sharding_strategy", None)
    sharded = strategy in ("optim_grads", "optim_grads_params")
    if _is_hybrid(args) and sharded and instances == getattr(args, "data_parallel_size", 0):
        found.append(
            f"--num-distributed-optimizer-instances {instances}: with one rank in each instance "
            f"Megatron-FSDP reduces the gradients of several micro-batches wrongly under "
            f"{strategy}; train with fewer instances, or with one micro-batch a step"
        )
    processes = getattr(args, "world_size", 0) // getattr(args, "pipeline_model_parallel_size", 1)
    sharing = (getattr(args, "expert_tensor_parallel_size", None) or 1) * getattr(
        args, "expert_model_parallel_size", 1
    )
    if getattr(args, "num_experts", None) and processes == sharing:
        found.append(
            f"--expert-model-parallel-size {args.expert_model_parallel_size}: where no rank shares "
            "its experts with another, Megatron-FSDP scales their gradients again in each "
            "micro-batch; train with more processes, or with one micro-batch a step"
        )
    return found


def check_interfaces(needed: Iterable[tuple[Any, str]], train_step: Any) -> None:
    """Warn of a version that was never tested, and refuse one whose interfaces are not there.

    Args:
        needed: owners and the names of what is replaced or called there.
        train_step: Megatron's, whose parameters are asked for by name.

    Raises:
        RuntimeError: names the version and what it lacks.
    """
    version = package_info.__version__
    missing = [f"{owner.__name__}.{name}" for owner, name in needed if not hasattr(owner, name)]
    parameters = inspect.signature(train_step).parameters if train_step else {}
    missing += [
        f"train_step({name})"
        for name in ("model", "optimizer", "config", "forward_backward_func")
        if name not in parameters
    ]
    if missing:
        raise RuntimeError(
            f"--measure-critical-sharpness-every: megatron-core {version} lacks "
            f"{', '.join(missing)}, where the measurement hooks in; use one of "
            f"{', '.join(TESTED)} or leave the flag out."
        )
    if not version.startswith(TESTED):
        warnings.warn(
            f"critical sharpness was never tested with megatron-core {version} (tested: "
            f"{', '.join(TESTED)}); its interfaces are all there, so it goes on.",
            stacklevel=2,
        )
