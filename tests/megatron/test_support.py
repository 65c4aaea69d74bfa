"""Versions and configurations: what is unknown warns, what is missing or unsafe is refused."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron.core import package_info

from megatron_sharpness.megatron import support


def train_step(data: Any, model: Any, optimizer: Any, config: Any, forward_backward_func: Any):
    return None


TRAINING, CHECKPOINTING = ModuleType("training"), ModuleType("checkpointing")
TRAINING.train_step = train_step  # type: ignore[attr-defined]
NEEDED = [(TRAINING, "train_step")]


def test_a_tested_version_passes_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    support.check_interfaces(NEEDED, train_step)
    assert not recwarn.list


def test_an_unknown_version_with_the_interfaces_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_info, "__version__", "0.99.0")
    with pytest.warns(UserWarning, match=r"never tested with megatron-core 0\.99\.0"):
        support.check_interfaces(NEEDED, train_step)


def test_an_unknown_version_without_them_is_refused_by_name() -> None:
    needed = [*NEEDED, (CHECKPOINTING, "check_checkpoint_args")]
    with pytest.raises(
        RuntimeError,
        match=r"lacks checkpointing\.check_checkpoint_args, train_step\(forward_backward_func\)",
    ):
        support.check_interfaces(needed, lambda model, optimizer, config: None)


def arguments(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"optimizer": "adam", "use_distributed_optimizer": True, **changes})


LAYER_WISE = {"use_layer_wise_distributed_optimizer": True, "use_layer_wise_param_layout": True}


def test_the_ordinary_configuration_is_accepted() -> None:
    support.refuse_unsupported(arguments())
    support.refuse_unsupported(arguments(optimizer="muon", use_distributed_optimizer=False))
    support.refuse_unsupported(arguments(optimizer="muon", **LAYER_WISE))


def test_all_that_is_refused_is_named_at_once() -> None:
    changes = {"fp4": "e2m1", "fp8_param_gather": True, "perform_rl_step": True}
    with pytest.raises(
        ValueError, match=r"--fp4-format e2m1: .*--fp8-param-gather True: .*--perform-rl-step"
    ):
        support.refuse_unsupported(arguments(**changes))


QUANTIZED = {"fp8": "hybrid", "fp8_recipe": "delayed"}


def test_what_tests_itself_is_named() -> None:
    assert support.self_tested(arguments()) == []
    assert support.self_tested(arguments(cuda_graph_impl="none", fp8=None)) == []
    both = arguments(**QUANTIZED, cuda_graph_impl="full_iteration", optimizer_cuda_graph=True)
    support.refuse_unsupported(both)
    assert support.self_tested(both) == [
        "fp8 delayed", "CUDA graphs full_iteration", "CUDA graph of the optimizer"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"fp8_recipe": "custom"}, "--fp8-recipe custom"),
        ({"critical_sharpness_mode": "eval"}, "--critical-sharpness-mode eval"),
        ({"critical_sharpness_frozen": 0}, "--critical-sharpness-frozen 0"),
    ],
)
def test_a_run_that_cannot_test_itself_is_refused(changes: dict[str, Any], flag: str) -> None:
    support.refuse_unsupported(arguments(**QUANTIZED))
    with pytest.raises(ValueError, match=flag):
        support.refuse_unsupported(arguments(**{**QUANTIZED, **changes}))
    with pytest.raises(ValueError, match="--fp8-format hybrid: it was never run"):
        support.refuse_unsupported(arguments(**QUANTIZED), self_tests=False)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"fp8_param_gather": True}, "--fp8-param-gather"),
        ({"reuse_grad_buf_for_mxfp8_param_ag": True}, "--reuse-grad-buf-for-mxfp8-param-ag"),
        ({"fp4": "e2m1"}, "--fp4-format"),
        ({"gtp_weight_remat_size": 2}, "--gtp-weight-remat-size 2"),
        ({"te_precision_config_file": "a.yaml"}, "--te-precision-config-file a.yaml"),
        ({"kitchen_config_file": "a.yaml"}, "--kitchen-config-file a.yaml"),
        ({"kitchen_recipe_number": 0}, "--kitchen-recipe-number 0"),
    ],
)
def test_what_was_never_run_is_refused(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match="--measure-critical-sharpness-every") as refusal:
        support.refuse_unsupported(arguments(**changes))
    assert flag in str(refusal.value) and "Leave one of the two out" in str(refusal.value)


HYBRID = {"use_megatron_fsdp": True, "num_distributed_optimizer_instances": 2}


def test_instances_of_megatron_fsdp_that_are_never_brought_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"instances 2: unless --overlap-grad-reduce .* no one θ"):
        support.refuse_unsupported(arguments(**HYBRID))
    support.refuse_unsupported(arguments(**HYBRID, overlap_grad_reduce=True))


def test_what_megatron_itself_gets_wrong_is_told() -> None:
    assert not support.faults_of_megatron(arguments(num_experts=4, world_size=2))
    hybrid = arguments(**HYBRID, outer_dp_sharding_strategy="optim")
    assert "--outer-dp-sharding-strategy optim" in support.faults_of_megatron(hybrid)[0]
    alone = {**HYBRID, "data_parallel_sharding_strategy": "optim_grads_params"}
    (told,) = support.faults_of_megatron(arguments(**alone, data_parallel_size=2))
    assert "--num-distributed-optimizer-instances 2: with one rank in each instance" in told
    assert not support.faults_of_megatron(arguments(**alone, data_parallel_size=4))
    experts = {"use_megatron_fsdp": True, "num_experts": 4, "expert_model_parallel_size": 2}
    (told,) = support.faults_of_megatron(arguments(**experts, world_size=2))
    assert "--expert-model-parallel-size 2" in told
    assert not support.faults_of_megatron(arguments(**experts, world_size=4))
