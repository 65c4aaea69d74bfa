"""The short matrix on the other megatron-core release that the tests install beside the newest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.megatron.harness import run

OTHER = os.environ.get("MEGATRON_CORE_OTHER")
pytestmark = pytest.mark.skipif(
    OTHER is None, reason="MEGATRON_CORE_OTHER does not name a second megatron-core installation"
)

LAYOUTS = {
    "tp with sequence parallelism": (2, "--tensor-model-parallel-size 2 --sequence-parallel --bf16 "
                                        "--use-distributed-optimizer"),
    "pp": (2, "--pipeline-model-parallel-size 2 --bf16"),
    "overlap": (2, "--bf16 --use-distributed-optimizer --overlap-grad-reduce "
                   "--overlap-param-gather"),
    "muon distributed": (2, "--optimizer muon --bf16 --use-distributed-optimizer"),
    "fp16": (1, "--fp16 --initial-loss-scale 4096"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_measured_training_is_bit_for_bit_the_same(layout: str, tmp_path: Path) -> None:
    assert OTHER is not None
    processes, flags = LAYOUTS[layout]
    paths = [OTHER]
    plain = run(
        tmp_path / "plain", flags, processes=processes, pythonpath=paths
    ).expect_success()
    measured = run(
        tmp_path / "measured", flags, processes=processes, every=2, pythonpath=paths
    ).expect_success()
    assert measured.hashes == plain.hashes
    assert measured.training_lines == plain.training_lines
    assert [record["status"] for record in measured.records] == ["found"] * 3
