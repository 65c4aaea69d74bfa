"""The pages say what the committed results of the benchmarks say."""

from __future__ import annotations

import importlib

import pytest

from benchmarks.__main__ import NAMES
from benchmarks.results import RESULTS, ROOT, load

PAGE = (ROOT / "docs" / "cost.md").read_text()


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_table(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").table(load(name)) in PAGE


def test_the_readme_has_rows_of_the_page() -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## What it costs\n")[1].split("\n## ")[0]
    assert len(rows(section)) > 10
    assert set(rows(section)) <= set(rows(PAGE))


def test_every_result_is_of_a_benchmark_and_says_where_it_ran() -> None:
    for path in RESULTS.glob("*.json"):
        assert path.stem in NAMES
        document = load(path.stem)
        assert document["machine"] and document["versions"]["torch"] and document["commit"]
