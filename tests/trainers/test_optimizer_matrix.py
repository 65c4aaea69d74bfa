"""The table of optimizers in docs/pytorch.md: which are measured, and under which layouts."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.processes import ROOT

from .harness import require, worker_fixture

PATHS = [
    *require("optimizers", "bitsandbytes"),
    *require("hf", "transformers"),
    *require("automodel", "torchao"),
]
alone = worker_fixture("optimizer_matrix_worker", "alone", 1, PATHS)
pair = worker_fixture("optimizer_matrix_worker", "pair", 2, PATHS)

SECTION = (ROOT / "docs/pytorch.md").read_text().split("## Optimizers, one by one")[1]
HEAD, *ROWS = (
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in re.findall(r"^\|[^-].*$", SECTION.split("\n## ")[0], re.MULTILINE)
)
#: What a cell says, by optimizer and layout.
CELLS = {(name, layout): said for name, *row in ROWS for layout, said in zip(HEAD[1:], row)}  # noqa: B905

WITHOUT_SLOPE = {"schedulefree.AdamWScheduleFree", "pytorch_optimizer.Muon"}
FILLS_FIRST = {"pytorch_optimizer.Shampoo", "pytorch_optimizer.SOAP"}


def test_the_table_names_what_is_run(
    alone: list[dict[str, Any]], pair: list[dict[str, Any]]
) -> None:
    run = {(name, layout) for name, by_layout in alone[0].items() for layout in by_layout}
    run |= {(name, layout) for name, by_layout in pair[0].items() for layout in by_layout}
    assert run == set(CELLS)
    assert set(CELLS.values()) == {"yes", "no"}


@pytest.mark.parametrize(("name", "layout"), [cell for cell in CELLS if cell[1] != "resumed"])
def test_it_is_measured_where_the_table_says_so(
    name: str, layout: str, request: pytest.FixtureRequest
) -> None:
    ranks = request.getfixturevalue("alone" if layout == "one process" else "pair")
    for rank in ranks:
        result = rank[name][layout]
        if CELLS[name, layout] == "no":
            assert re.search("DTensor|sharding strategy|placement", result["error"])
            continue
        assert "error" not in result, result["error"]
        assert result["same"]
        first, second = result["records"]
        assert first["status"] == ("skipped_step" if name in FILLS_FIRST else "found")
        assert second["status"] == "found", second["reason"]
        record, anew = result["record"], result["anew"]
        assert record == ranks[0][name][layout]["record"]
        assert anew["lower"] <= anew["loss"] < anew["upper"]
        assert record["loss"] == pytest.approx(anew["loss"], rel=1e-6)
        assert record["critical_lr"] == pytest.approx(anew["critical_lr"], rel=1e-3)
        slope = None if name in WITHOUT_SLOPE else pytest.approx(anew["slope"], rel=1e-5)
        assert record["slope"] == slope


@pytest.mark.parametrize("name", [name for name, *_ in ROWS])
def test_a_resumed_run_measures_the_same(name: str, alone: list[dict[str, Any]]) -> None:
    result = alone[0][name]["resumed"]
    assert CELLS[name, "resumed"] == "yes"
    assert result["same"]
    assert [record["status"] for record in result["again"]] == ["found"]
    assert result["again"] == result["records"]
