"""The pages say what the committed results of the benchmarks say."""

from __future__ import annotations

import importlib

import pytest

from benchmarks.__main__ import NAMES
from benchmarks.results import RESULTS, ROOT, load

PAGE = "".join((ROOT / "docs" / name).read_text() for name in ("cost.md", "verify.md"))


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_table(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").table(load(name)) in PAGE


def test_the_page_of_verify_shows_what_it_has_said() -> None:
    first = next(iter(load("verified")["results"].values()))
    assert "\n".join(f"{name}: {said}" for name, said in first["promises"].items()) in PAGE


def test_the_sentences_of_the_readme_have_the_figures_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text()
    said = " ".join(readme.split("## What it costs\n")[1].split("\n## ")[0].split())
    prices = [case["price"][1] for case in load("probe")["results"].values()]
    assert f"costs {min(prices):.2f} to {max(prices):.2f} plain forward-only passes" in said
    warm = [
        row["mean"]
        for row in load("passes")["results"]
        if (row["group"], row["phase"], row["method"]) == ("held out", "step >= 20", "certified")
        and row["cadence"] != "cold"
    ]
    assert f"a measurement makes {min(warm):.1f} to {max(warm):.1f} probes" in said
    inside = load("training")["results"]["100"]["inside"][1]
    assert f"Every 100 iterations that is {100 * inside:.2f} % of the training time" in said


def test_every_result_is_of_a_benchmark_and_says_where_it_ran() -> None:
    for path in RESULTS.glob("*.json"):
        assert path.stem in NAMES
        document = load(path.stem)
        assert document["machine"] and document["versions"]["torch"] and document["commit"]
