"""The page of ``megatron-sharpness report``, opened in a real browser: Chromium, headless."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from megatron_sharpness import cli
from megatron_sharpness.report import verdict
from megatron_sharpness.report.curves import _hover
from megatron_sharpness.report.page import _notes
from megatron_sharpness.report.records import Curve, Logged, Run, read_records
from megatron_sharpness.report.stages import NOISE_RULE, RULES
from tests.processes import ROOT

from .test_report import MISSED, record, write

QUICKSTART = ROOT / "benchmarks/results/quickstart.jsonl"
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
EVIL_NAME = "<img src=x onerror=nope()> & $run"
EVIL_REASON = "RuntimeError: </script><script>nope()</script>"

needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH"
)
pytestmark = pytest.mark.timeout(600)  # of a browser on a busy machine


class Page(HTMLParser):
    """What is in a page: its words, what it would load, and the shapes of its plots.

    Attributes:
        words: all text but that of scripts and styles, in one line.
        loads: the addresses that its elements name.
        shapes: how many lines, points and bars each pair of axes (``x2y2``) has.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.shapes: Counter[tuple[str, str]] = Counter()
        self._groups: list[str] = []
        self._data: list[str] = []
        self.feed(text)
        self.words = " ".join("".join(self._data).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        kind = attributes.get("class") or ""
        self.tags.add(tag)
        names = ("src", "srcset", "href", "data", "poster", "action")
        self.loads += [attributes[name] or "" for name in names if name in attributes]
        if tag == "g":
            self._groups.append(kind)
        elif tag == "path" and (attributes.get("d") or "").startswith("M") and self._groups:
            if self._groups[-1] == "point":
                kind = "bar"
            axes = [group for group in self._groups if re.fullmatch(r"x\d*y\d*", group)]
            if axes and kind in ("js-line", "point", "bar"):
                self.shapes[axes[-1], kind] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "g":
            self._groups.pop()

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self._data.append(data + " ")


class Opened(NamedTuple):
    """A page after the browser has run its scripts, and what it complained of."""

    page: Page
    complaints: list[str]


def open_page(page: Path, folder: Path) -> Opened:
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={folder / 'profile'}", "--window-size=1200,1000",
            "--virtual-time-budget=10000", "--enable-logging=stderr", "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return Opened(Page(done.stdout), re.findall(r".*:CONSOLE[:(].*", done.stderr))


def catapult() -> list[dict[str, Any]]:
    """A run with a catapult event, whose last measurements found nothing."""
    ratio = np.concatenate([np.full(20, 0.7), [1.6, 1.2], np.full(20, 0.2)])
    found = [
        record(10 * i, critical_sharpness=2000 * each, lr_over_critical=each)
        for i, each in enumerate(ratio, start=1)
    ]
    missed = [record(500 + 10 * i, each, reason=EVIL_REASON) for i, each in enumerate(MISSED)]
    return [*found, *missed, record(700, "failed")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("plotly")
    folder = tmp_path_factory.mktemp("pages")
    evil = write(folder / f"{EVIL_NAME}.jsonl", catapult())
    short = write(folder / "short.jsonl", [record(10)])
    nothing = write(folder / "nothing.jsonl", [record(10, "zero_lr", lr=0.0, loss=None)])
    written = {}
    for name, runs in (("one", [QUICKSTART]), ("several", [QUICKSTART, evil, short, nothing])):
        written[name] = folder / f"{name}.html"
        assert cli.main(["report", *map(str, runs), "--out", str(written[name])]) == 0
    return written


@pytest.fixture(scope="module")
def opened(pages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opened]:
    return {
        name: open_page(page, tmp_path_factory.mktemp("browser")) for name, page in pages.items()
    }


@needs_browser
@pytest.mark.parametrize("name", ["one", "several"])
def test_the_page_opens_without_complaints(opened: dict[str, Opened], name: str) -> None:
    assert opened[name].complaints == []


@needs_browser
@pytest.mark.parametrize(
    ("trouble", "complaint"),
    [
        ("<script>nope()</script>", "nope is not defined"),
        ('<img src="https://example.com/a.png">', "Content Security Policy"),
        ("<script>fetch('https://example.com/')</script>", "Content Security Policy"),
    ],
)
def test_the_browser_would_have_complained(
    pages: dict[str, Path], tmp_path: Path, trouble: str, complaint: str
) -> None:
    page = tmp_path / "broken.html"
    page.write_text(pages["one"].read_text().replace("</h1>", f"</h1>{trouble}"))
    assert any(complaint in line for line in open_page(page, tmp_path).complaints)


@pytest.mark.parametrize("name", ["one", "several"])
def test_the_page_loads_nothing(pages: dict[str, Path], name: str) -> None:
    page = pages[name].read_text()
    assert "default-src 'none'" in page
    elements = Page(page)
    assert {"script", "table", "meta"} <= elements.tags
    assert not elements.tags & {"link", "iframe", "img", "object", "embed"}
    assert elements.loads == []


@needs_browser
def test_every_curve_of_one_run_is_drawn(opened: dict[str, Opened]) -> None:
    measurements = len(read_records(QUICKSTART))
    assert opened["one"].page.shapes == {
        ("xy", "bar"): 3,  # early transient, below the edge, progressive sharpening
        ("x2y2", "js-line"): 3,  # λ_c and both lines
        ("x2y2", "point"): measurements,
        ("x3y3", "js-line"): 2,  # η and η_c
        ("x3y3", "point"): measurements,
        ("x4y4", "js-line"): 2,  # η/η_c and the line at 1
        ("x4y4", "point"): measurements,
        ("x6y6", "js-line"): 1,  # loss
        ("x7y7", "js-line"): 1,  # forward passes
        ("x7y7", "point"): measurements,
        ("x8y8", "js-line"): 1,  # seconds
        ("x8y8", "point"): measurements,
    }


@needs_browser
def test_runs_are_drawn_over_each_other_with_what_was_not_found(opened: dict[str, Opened]) -> None:
    page = opened["several"].page
    found, missed = 40 + 42 + 1, len(MISSED) + 1 + 1
    assert page.shapes["x2y9", "point"] == missed
    assert page.shapes["x2y2", "point"] == found + 1  # and the ring around the catapult event
    assert page.shapes["x4y4", "point"] == found
    assert page.shapes["x8y8", "point"] == found + missed
    assert page.shapes["x2y2", "js-line"] >= 4  # λ_c and the line of two
    for status in MISSED:
        number = 2 if status in ("failed", "zero_lr") else 1
        assert f"{status} ({number})" in page.words
    assert "catapult event (1)" in page.words


@needs_browser
def test_the_table_says_where_each_run_stands(opened: dict[str, Opened]) -> None:
    words = opened["several"].page.words
    assert "iterations 320 to 400): η/η c is 0.193 in the median" in words
    evil = f"{EVIL_NAME} 52 42 found 1 not_descent"
    assert evil in words
    assert re.search(r"2 failed learning rate .*? below the edge, as of iteration 420 ", words)
    assert "210–230: λ c 1.6 × the line, no loss spike seen" in words
    few = "too few measurements to tell"
    assert re.search(rf"short 1 1 found {few} stable .*? there are 1: .*? {few} – none", words)
    assert re.search(rf"nothing 1 0 found 1 zero_lr {few} 5 .*? are 0: .*? {few} – none", words)


@needs_browser
def test_the_page_states_the_rules_and_whose_they_are(opened: dict[str, Opened]) -> None:
    words = opened["one"].page.words
    assert "rules of thumb of this program, not the paper’s" in words
    for text in (*RULES.values(), NOISE_RULE, *verdict.RULES.values(), verdict.RULE):
        assert text.replace("_c", "c").replace(" ", "") in words.replace(" ", "")


def test_pointing_at_a_measurement_tells_all_of_it() -> None:
    found = record(10, loss=2.125)
    told = _hover(Run("a <b> run", [found]), found)
    for text in ("a &lt;b&gt; run, iteration 10", "1000", "0.002", "0.5", "2.125", "found"):
        assert text in told
    failed = record(20, "failed", reason=EVIL_REASON)
    assert "RuntimeError: &lt;/script&gt;" in _hover(Run("run", [failed]), failed)


def test_what_is_known_at_the_measurements_only_is_said() -> None:
    curve = Curve(np.arange(3.0), np.arange(3.0))
    runs = [Run("a&b", [record(10)], Logged({"loss": curve})), Run("c", [record(10)])]
    assert _notes(runs) == (
        "The loss of c is known at the measurements only. "
        "The learning rate of a&amp;b, c is known at the measurements only."
    )
    assert _notes([Run("d", [record(10)], Logged({"loss": curve, "lr": curve}))]) == ""


def test_a_page_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")
    out = tmp_path / "none" / "page.html"
    assert cli.main(["report", str(QUICKSTART), "--out", str(out)]) == 1
    assert f"--out {out}: cannot be written (No such file" in capsys.readouterr().err
