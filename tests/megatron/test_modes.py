"""The page of all modes says what the code decides."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")

from megatron_sharpness.megatron import support
from tests.megatron.harness import ROOT
from tests.megatron.modes import SELF_TESTED, tables
from tests.megatron.test_bitwise import LAYOUTS


def test_the_page_has_the_tables() -> None:
    assert tables() in (ROOT / "docs" / "megatron_modes.md").read_text()


def test_what_is_promised_counts_them() -> None:
    promised = (ROOT / "docs" / "guarantees.md").read_text()
    assert f"({len(LAYOUTS)} layouts and modes of Megatron" in promised


def test_every_mode_that_tests_itself_is_in_them() -> None:
    shown = {name for _, arguments in SELF_TESTED for name in arguments}
    assert shown - {"fp8_recipe"} == set(support.SELF_TESTED)
