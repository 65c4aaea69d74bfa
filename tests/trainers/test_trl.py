"""Fine-tuning with PEFT's adapters and TRL's trainers: same training, right numbers, same logs."""

from __future__ import annotations

from typing import Any

import pytest

from .harness import check_records, require, untimed, worker_fixture
from .test_hf import of_training

PATHS = [*require("trl", "trl"), *require("hf", "transformers")]
alone = worker_fixture("trl_worker", "alone", 0, PATHS)

TRAINERS = ("LoRA", "SFT", "SFT, padded, DoRA", "DPO", "DPO, precomputed", "DPO, LoRA")
DUE = [2, 4]


@pytest.fixture(params=TRAINERS)
def runs(alone: list[dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    return alone[0]["trainers"][request.param]


def test_training_and_its_logs_are_the_same(runs: dict[str, Any]) -> None:
    assert runs["on"]["digest"] == runs["off"]["digest"]
    assert of_training(runs["on"]["logs"]) == of_training(runs["off"]["logs"])


def test_records_agree_with_the_definitions(runs: dict[str, Any]) -> None:
    check_records(runs["on"], DUE)


@pytest.mark.parametrize("name", ["LoRA", "SFT", "DPO, LoRA"])
def test_a_resumed_run_measures_the_same(alone: list[dict[str, Any]], name: str) -> None:
    runs = alone[0]["trainers"][name]
    assert runs["resumed"]["digest"] == runs["on"]["digest"]
    assert untimed(runs["resumed"]["records"]) == untimed(runs["on"]["records"])[1:]


@pytest.mark.parametrize("kind", ["lora", "4 bits", "4 bits, bf16", "8 bits"])
def test_a_loop_with_adapters_is_measured(alone: list[dict[str, Any]], kind: str) -> None:
    off, on = (alone[0]["loop"][kind][name] for name in ("off", "on"))
    assert on["digest"] == off["digest"] == on["resumed"]["digest"]
    assert untimed(on["resumed"]["records"]) == untimed(on["records"])[2:]
    check_records(on, [1, 2, 3, 4])


def test_the_noise_is_that_of_what_a_quantized_base_computes_in(
    alone: list[dict[str, Any]],
) -> None:
    noise = {
        kind: [record["noise"] for record in alone[0]["loop"][kind]["on"]["records"][1:]]
        for kind in ("4 bits", "4 bits, bf16")
    }
    assert min(noise["4 bits, bf16"]) > 10 * max(noise["4 bits"])


def test_the_first_step_moves_what_begins_at_zero_alone(alone: list[dict[str, Any]]) -> None:
    """LoRA's B; the gradient of A is a product with it."""
    for kind in ("lora", "4 bits"):
        moved = alone[0]["loop"][kind]["on"]["moved"]
        assert len(moved) == 14 and all("lora_B" in name for name in moved)


def test_it_is_not_of_the_merged_weights(alone: list[dict[str, Any]]) -> None:
    """The same product of other factors has the same loss, and another critical learning rate."""
    ((loss, lr),), ((other_loss, other_lr),) = alone[0]["factored"]
    assert other_loss == pytest.approx(loss, rel=1e-9)
    assert other_lr < 0.7 * lr


def test_the_script_of_the_page_runs(alone: list[dict[str, Any]]) -> None:
    records = [(record["iteration"], record["status"]) for record in alone[0]["page"]]
    assert records == [(5, "found"), (10, "found"), (15, "found"), (20, "found")]
