"""accelerate's FSDP2 in a loop of one's own: its model and optimizer are measured as they are."""

from __future__ import annotations

from .harness import Ranks, check_records, require, untimed, worker_fixture

pair = worker_fixture("accelerate_worker", "pair", 2, require("hf", "accelerate"))


def test_training_is_bit_for_bit_the_same(pair: Ranks) -> None:
    for rank in pair:
        assert rank["on"]["digest"] == rank["off"]["digest"]
        assert rank["on"]["losses"] == rank["off"]["losses"]
    assert pair[0]["off"]["digest"] != pair[1]["off"]["digest"]  # each has its own shards


def test_records_agree_with_the_definitions(pair: Ranks) -> None:
    check_records(pair[0]["on"], [2, 4, 6])


def test_a_resumed_run_measures_the_same(pair: Ranks) -> None:
    """Registered for accelerate's checkpoints, as its documentation says."""
    assert untimed(pair[0]["resumed"]["records"]) == untimed(pair[0]["on"]["records"])[1:]
    for rank in pair:
        assert rank["resumed"]["digest"] == rank["on"]["digest"]
