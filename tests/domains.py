"""Two kinds of text that every Python has, in Megatron's format."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sharpness.data.tokenize import python_code, python_prose, write_dataset


def write_domains(folder: Path) -> Path:
    """Writes ``prose`` and ``code`` into the folder, five documents each, and returns it.

    The test is skipped where megatron-core is missing.
    """
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    for name, documents in (("prose", python_prose()), ("code", python_code())):
        write_dataset(folder / name, [next(documents)[:20000] for _ in range(5)])
    return folder
