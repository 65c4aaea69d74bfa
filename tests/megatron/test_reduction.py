"""The loss over all ranks: each token once, the same number everywhere, errors included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.harness import run

SCRIPT = Path(__file__).with_name("reduction.py")

#: Layout of two ranks → which of them count.
LAYOUTS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "data parallel": ({}, [0, 1]),
    "context parallel": ({"context_parallel_size": 2}, [0, 1]),
    "tensor parallel": ({"tensor_model_parallel_size": 2}, [0]),
    "pipeline parallel": ({"pipeline_model_parallel_size": 2}, [1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_counts_once_and_all_ranks_agree(layout: str, tmp_path: Path) -> None:
    options, counted = LAYOUTS[layout]
    result = run(
        tmp_path, "", processes=2, script=SCRIPT, module=None,
        environment={"LAYOUT": json.dumps(options)},
    ).expect_success()  # fmt: skip
    ours, theirs = (
        json.loads((result.folder / f"rank{rank}.json").read_text()) for rank in (0, 1)
    )
    assert ours == theirs
    total = sum(30.0 + 2 * rank for rank in counted)
    assert ours["tokens alike"] == pytest.approx([total / (10 * len(counted)), 10 * len(counted)])
    alike = sum((10 + rank) / 4 + (20 + rank) / 6 for rank in counted) / (2 * len(counted))
    assert ours["micro-batches alike"] == pytest.approx([alike, 10 * len(counted)])
    # Older scripts return means, without a number of tokens: samples are counted. The schedule
    # multiplies them by the context-parallel ranks.
    mean = sum(6.0 + 2 * rank for rank in counted) / (2 * len(counted))
    mean *= options.get("context_parallel_size", 1)
    assert ours["means"] == pytest.approx([mean, 6 * len(counted)])
    assert ours["error"] == "rank 1: ValueError: injected"
