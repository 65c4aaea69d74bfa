"""``megatron-sharpness tokenize``: what it writes, Megatron reads back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sharpness import cli
from megatron_sharpness.core.errors import InputError
from megatron_sharpness.data.tokenize import (
    END_OF_DOCUMENT,
    python_code,
    python_prose,
    write_dataset,
)
from tests.processes import ROOT


def read(prefix: Path) -> list[bytes]:
    """The documents of a dataset, after checking that each ends in the end-of-document id."""
    indexed: Any = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = []
    for ids in indexed.IndexedDataset(str(prefix)):
        assert ids[-1] == END_OF_DOCUMENT
        documents.append(bytes(ids[:-1].astype("uint8")))
    return documents


def tokenize(*arguments: object) -> int:
    return cli.main(["tokenize", *map(str, arguments)])


def test_text_and_jsonl_come_back_byte_by_byte_in_order(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_bytes(bytes(range(256)))
    lines.write_text('{"body": "η_c"}\n\n{"body": ""}\n{"body": "2/λ"}\n')
    prefix = tmp_path / "new" / "folder" / "data"
    assert tokenize(prefix, "--jsonl", lines, "--json-key", "body", "--text", text) == 0
    assert read(prefix) == [bytes(range(256)), "η_c".encode(), "2/λ".encode()]
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["data.bin", "data.idx"]


def test_python_docs_are_capped_and_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    for name in ("once", "again"):
        arguments = ("--python-docs", "prose", "code", "--max-bytes", 600_000)
        assert tokenize(tmp_path / name, *arguments) == 0
    documents = read(tmp_path / "once")
    assert sum(map(len, documents)) == 600_000
    assert documents == read(tmp_path / "again")
    prose = list(python_prose())
    assert documents[: len(prose)] == prose
    assert documents[len(prose)] == next(python_code())


def test_python_code_holds_modules_but_no_tests() -> None:
    documents = list(python_code())
    assert any(b"class JSONDecoder" in document for document in documents)
    assert not any(b"class TestDecode" in document for document in documents)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n{"text": ', r"--jsonl \S+b\.jsonl, line 2: not JSON .*--text"),
        ('{"body": "x"}\n', r"b\.jsonl, line 1: no text under the key 'text'.*--json-key"),
        ('{"text": 3}\n', "line 1: no text"),
        ('["x"]\n', "line 1: no text"),
    ],
)
def test_jsonl_that_cannot_be_used_is_refused_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    pytest.importorskip("megatron.core")
    lines = tmp_path / "b.jsonl"
    lines.write_text(content)
    assert tokenize(tmp_path / "out", "--jsonl", lines) == 1
    error = capsys.readouterr().err
    assert error.startswith("megatron-sharpness tokenize: error: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)
    assert [path.name for path in tmp_path.iterdir()] == ["b.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to tokenize: give --python-docs, --text or --jsonl"),
        (["--text", "no/such.txt"], "--text no/such.txt: no such file; give a file of text"),
        (["--jsonl", str(ROOT)], f"--jsonl {ROOT}: it is a folder; give a file of text"),
        (["--python-docs", "prose", "--max-bytes", "0"], "--max-bytes 0: must be at least 1"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert tokenize(tmp_path / "out", *arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "content", "reason"),
    [
        ("--text", "", "empty"),
        ("--text", " \n\t\n", "empty but for white space"),
        ("--jsonl", "\n\n", "empty"),
        ("--jsonl", '{"text": ""}\n{"text": "\\n"}\n', "empty but for white space"),
    ],
)
def test_what_is_empty_is_refused_before_megatron_is_imported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    content: str,
    reason: str,
) -> None:
    monkeypatch.setitem(sys.modules, "megatron", None)
    (tmp_path / "file").write_text(content)
    assert tokenize(tmp_path / "out", flag, tmp_path / "file") == 1
    error = capsys.readouterr().err
    assert f"{flag} {tmp_path / 'file'}: {reason}; give a file that has text" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_but_its_own_lines_is_written_or_read_with(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    text, empty = tmp_path / "text.txt", tmp_path / "empty.txt"
    text.write_text("\na text")
    empty.touch()
    code = (
        "import sys; from megatron_sharpness import cli; "
        "from megatron_sharpness.data.windows import read_indexed; "
        "assert cli.main(['tokenize', *sys.argv[1:]]) == 0; "
        "print(read_indexed(sys.argv[1], '')[1].tolist())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment |= {"CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}  # torch warns of both
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), "--text", str(empty), str(text)],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "[8]"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/out: cannot be written .*choose another PREFIX"):
        write_dataset(tmp_path / "file" / "out", [b"text"])
