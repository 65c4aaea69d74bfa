"""The snippets that the pages of ``docs/`` start with run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT


def test_the_loop_of_the_pytorch_page_runs_and_writes_curves(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "pytorch.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert snippet is not None
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", snippet[1]],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("status: found") == 5
    assert list((tmp_path / "runs" / "loop").glob("events.out.tfevents.*"))


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
