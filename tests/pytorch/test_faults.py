"""A fault costs the measurement, on all ranks together, and never the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.harness import finish
from tests.processes import start_ranks

from .faults import FAULTS, LAYOUTS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("faults")
    started = start_ranks(["-m", "tests.pytorch.faults", str(folder)], folder, 2)
    finish(started, folder, 240.0).expect_success()
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank*.json"))]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_give_up_together_and_train_on(
    layout: str, fault: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        found = rank[f"{layout}: {fault}"]
        assert all(found["equal"].values()), found["equal"]
        failed, measured = found["records"]
        assert failed["status"] == "failed" and measured["status"] == "found"
        assert f"rank {0 if 'inside' in fault else 1}: " in failed["reason"]
        assert fault in failed["reason"]
