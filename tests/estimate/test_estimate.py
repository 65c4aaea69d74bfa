"""``megatron-sharpness estimate``: what it counts, and what it predicts."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest

from megatron_sharpness import cli, estimate
from megatron_sharpness.core.errors import InputError
from megatron_sharpness.estimate import model
from tests.processes import ROOT

LLAMA_7B = ROOT / "configs/llama_7b.args"
LLAMA_70B = ROOT / "configs/llama_70b.args"
TINY = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --vocab-size 200
--micro-batch-size 1 --global-batch-size 8"""
MEASURED = json.loads((ROOT / "benchmarks/results/growth.json").read_text())["results"]


def flags_of(path: Path) -> argparse.Namespace:
    return estimate.parse_flags(estimate.split(path.read_text()))


def tiny(more: str = "") -> argparse.Namespace:
    return estimate.parse_flags(f"{TINY} {more}".split())


def cost_of(run: estimate.Run, forward: float = 1.0) -> estimate.Cost:
    return estimate.cost(run, forward, memory_bandwidth=1e6, network_bandwidth=1e5, passes=3.0)


def command(*arguments: object) -> int:
    return cli.main(["estimate", *map(str, arguments)])


def test_the_parameters_of_llama_are_those_of_its_papers() -> None:
    assert estimate.count_parameters(flags_of(LLAMA_7B)) == 6_738_415_616
    # Llama 2's own 68 976 648 192, and the vocabulary padded from 32 000 to 32 768 = 128 · 8 · 32
    assert estimate.count_parameters(flags_of(LLAMA_70B)) == 68_976_648_192 + 2 * 768 * 8192


def test_biases_positions_and_tied_embeddings_are_counted() -> None:
    layer = 12 * 64**2 + 13 * 64  # 4 h² + 8 h², biases 3 h + h + 4 h + h, two norms 4 h
    expected = 2 * layer + (256 + 32) * 64 + 2 * 64  # 200 tokens are padded to 256
    assert estimate.count_parameters(tiny()) == expected
    assert (
        estimate.count_parameters(tiny("--untie-embeddings-and-output-weights"))
        == expected + 256 * 64
    )


def test_a_rank_has_its_part_of_the_largest_stage() -> None:
    flags = tiny("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2")
    layer = 12 * 64**2 // 2 + (7 * 64) // 2 + 6 * 64  # norms and two biases are on every rank
    assert estimate.plan(flags, 4).share == layer + 128 * 64 + 32 * 64


def test_a_case_by_hand() -> None:
    run = estimate.plan(tiny("--bf16 --use-distributed-optimizer"), 4)
    assert run.owned == math.ceil(run.share / 4) and run.share == run.parameters
    assert run.micro_batches == 2
    assert run.memory == 4 * run.owned
    assert run.gathered == 2 * run.share * 3 / 4
    cost = cost_of(run)
    gather = run.gathered / 1e5
    assert cost.probe == pytest.approx(1.0 + 10 * run.owned / 1e6 + gather)
    assert cost.measurement == pytest.approx(
        (8 + 180 + 6) * run.owned / 1e6 + gather + 3 * cost.probe
    )
    assert cost.overhead(10, 2.0) == pytest.approx(cost.measurement / 20)


def test_fp32_without_the_distributed_optimizer_copies_twice_and_gathers_nothing() -> None:
    run = estimate.plan(tiny(), 4)
    assert run.owned == run.parameters and run.gathered == 0
    assert run.memory == 8 * run.owned
    cost = cost_of(run)
    assert cost.measurement == pytest.approx(3.0 + (16 + 180 + 3 * 12 + 8) * run.owned / 1e6)


def test_offloaded_copies_cross_to_the_host() -> None:
    text = "--bf16 --use-distributed-optimizer"
    here, there = (
        estimate.plan(tiny(f"{text} --critical-sharpness-offload {place}"), 4)
        for place in ("none", "cpu")
    )
    crossed = 4 * here.owned / model.HOST_BANDWIDTH
    assert there.memory == here.memory
    assert cost_of(there).write - cost_of(here).write == pytest.approx(crossed, rel=1e-3)
    assert cost_of(there).snapshot - cost_of(here).snapshot == pytest.approx(crossed, rel=1e-3)
    assert cost_of(there).restore == cost_of(here).restore


@pytest.mark.parametrize(
    ("stages", "gather", "exposed"),
    [(1, 0.2, 0.0), (1, 0.6, 0.1), (2, 0.3, 0.0), (2, 0.5, 0.2)],
)
def test_overlapped_gathers_hide_behind_the_first_micro_batch_of_each_stage(
    stages: int, gather: float, exposed: float
) -> None:
    flags = tiny(
        "--bf16 --use-distributed-optimizer --overlap-param-gather "
        f"--pipeline-model-parallel-size {stages}"
    )
    run = estimate.plan(flags, 4 * stages)
    forward = 0.5 * 2 if stages == 1 else 0.4 * 3  # a micro-batch on a stage, m + p − 1 times
    assert run.micro_batches == 2
    assert estimate.exposed_gather(run, forward, gather) == pytest.approx(exposed)


def test_a_forward_pass_from_the_operations_of_the_gpus() -> None:
    run = estimate.plan(flags_of(LLAMA_7B), 64)
    tokens = 512 * 4096
    flops = tokens * (2 * 6_738_415_616 + 2 * 32 * 4096 * 4096)
    assert estimate.forward_seconds(run, 400.0) == pytest.approx(flops / (64 * 400e12) * 33 / 32)
    assert estimate.iteration_seconds(run, 2.0) == 6.0
    recomputed = estimate.plan(tiny("--recompute-granularity full"), 1)
    assert estimate.iteration_seconds(recomputed, 2.0) == 8.0


def test_measured_measurements_are_predicted_within_a_fifth() -> None:
    cases = MEASURED["cases"]
    assert {case["processes"] for case in cases} == {1, 2, 4, 8}
    for name in ("parameters", "sequence", "micro_batches"):
        assert len({case[name] for case in cases}) >= 3
    for case in cases:
        assert 0.8 <= case["ratio"][1] <= 1.2, case
        assert case["owned"]["predicted"] == pytest.approx(case["owned"]["measured"], rel=0.01)


@pytest.mark.parametrize(("name", "gpus"), [("llama_7b", 64), ("llama_70b", 1024)])
def test_every_100_costs_less_than_a_percent_on_many_gpus(name: str, gpus: int) -> None:
    run = estimate.plan(flags_of(ROOT / "configs" / f"{name}.args"), gpus)
    forward = estimate.forward_seconds(run, model.TFLOPS)
    cost = estimate.cost(
        run,
        forward,
        memory_bandwidth=2680e9,
        network_bandwidth=50e9,
        passes=model.PASSES,
    )
    overhead = cost.overhead(100, estimate.iteration_seconds(run, forward))
    assert model.PASSES / 300 < overhead < 0.01
    committed = MEASURED["predictions"][name]
    assert committed["gpus"] == gpus
    assert committed["overhead"]["100"] == pytest.approx(overhead)
    assert committed["memory"] == run.memory


def test_the_command_prints_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--config", LLAMA_7B, "--gpus", 64, "--forward-seconds", 2, "--every", 50) == 0
    text = capsys.readouterr().out
    assert "6.738 billion" in text
    assert "tensor 2 × pipeline 2 × context 1 × data 16, 32 micro-batches" in text
    assert "forward pass          2.000 s" in text and "training iteration    6.000 s" in text
    assert "overhead, every 50" in text and "every 100" not in text
    assert "402 MiB on each GPU" in text
    assert "2680 GB/s of memory, 50 GB/s" in text and "TFLOP/s" not in text


def test_offload_is_a_flag_of_the_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    offload = ("--critical-sharpness-offload", "cpu")
    assert command("--config", LLAMA_70B, "--gpus", 1024, *offload) == 0
    assert "259 MiB in host memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--gpus 0", "--gpus 0: must be positive"),
        ("--gpus 6", "--gpus 6: not a multiple of 4"),
        ("--gpus 12", "--global-batch-size 512: not a multiple of --micro-batch-size 1 × data"),
        ("--gpus 64 --forward-seconds -1", "--forward-seconds -1.0: must be positive"),
        ("--gpus 64 --tflops nan", "--tflops nan: must be positive"),
        ("--gpus 64 --iteration-seconds 0", "--iteration-seconds 0.0: must be positive"),
        ("--gpus 64 --memory-bandwidth 0", "--memory-bandwidth 0.0: must be positive"),
        ("--gpus 64 --network-bandwidth inf", "--network-bandwidth inf: must be positive"),
        ("--gpus 64 --passes 0", "--passes 0.0: must be positive"),
        ("--gpus 64 --every 10 0", "--every 0: must be positive"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--config", LLAMA_7B, *arguments.split()) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--hidden-size 64", "--num-layers: missing; add it"),
        (f"{TINY} --num-experts 8", "--num-experts 8: the estimate counts"),
        (f"{TINY} --multi-latent-attention", "--multi-latent-attention True: the estimate counts"),
        (f"{TINY} --num-layers many", "argument --num-layers: invalid int value: 'many'"),
        (f"{TINY} --seq-length 0", "--seq-length 0: must be at least 1"),
        (f"{TINY} '", "cannot be read (No closing quotation)"),
    ],
)
def test_bad_configurations_are_refused_by_name(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "bad.args"
    config.write_text(text)
    assert command("--config", config, "--gpus", 1) == 1
    error = capsys.readouterr().err
    assert f"--config {config}: " in error and said in error


def test_a_missing_configuration_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--config", "configs/none.args", "--gpus", 8) == 1
    assert "--config configs/none.args: cannot be read (No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "gpus", "said"),
    [
        ("--num-layers 3 --pipeline-model-parallel-size 2", 2, "--num-layers 3"),
        ("--tensor-model-parallel-size 8 --ffn-hidden-size 256", 8, "--num-attention-heads 4"),
        ("--tensor-model-parallel-size 2 --group-query-attention --num-query-groups 1", 2,
         "--num-query-groups 1"),
        ("--tensor-model-parallel-size 4 --ffn-hidden-size 254", 4, "--ffn-hidden-size 254"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused(flags: str, gpus: int, said: str) -> None:
    with pytest.raises(InputError, match=f"{said}: not a multiple of --.* give a multiple of it"):
        estimate.plan(tiny(flags), gpus)
