"""The snippets that the pages start with run as they stand, and links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, start_ranks

PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "experiments/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
]


@pytest.mark.parametrize(("page", "measurements"), [("README.md", 4), ("docs/pytorch.md", 5)])
def test_the_loop_of_a_page_runs_and_its_records_are_drawn(
    page: str, measurements: int, tmp_path: Path
) -> None:
    snippet = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert snippet is not None
    python(tmp_path, "-c", snippet[1])
    assert list((tmp_path / "runs" / "loop").glob("events.out.tfevents.*"))
    drawn = python(
        tmp_path, "-m", "megatron_sharpness.cli", "report", "runs/loop", "--out", "curves.png"
    )
    assert f"{measurements} found" in drawn
    assert (tmp_path / "curves.png").is_file()


def test_the_pipeline_of_its_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs/pipelining.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert snippet is not None
    ranks = start_ranks(["-c", snippet[1]], tmp_path, 2)
    codes = [rank.wait(timeout=120) for rank in ranks]
    assert not any(codes), [path.read_text()[-2000:] for path in tmp_path.glob("output*.txt")]
    command = ("-m", "megatron_sharpness.cli", "report", "runs/pipeline", "--out", "curves.png")
    assert "5 found" in python(tmp_path, *command)


def test_the_loop_that_is_verified_holds_its_promises(tmp_path: Path) -> None:
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "docs/verify.md").read_text(), re.DOTALL)
    assert snippet is not None
    said = python(tmp_path, "-c", snippet[1])
    assert "training with measurement is the same: yes, bit for bit" in said
    assert (tmp_path / "verified" / "verify.md").is_file()


def python(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text())
        for target, heading in links:
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            if heading:
                assert heading in headings(file), f"{page.name}: {target}#{heading}"


def headings(page: Path) -> list[str]:
    """Of a page, as links name them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_the_readme_is_a_first_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
