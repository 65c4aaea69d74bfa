"""Text into Megatron's indexed dataset format, one token a byte.

The vocabulary is the 256 bytes and :data:`END_OF_DOCUMENT`. Megatron reads it without a tokenizer
file, by the same flags in every supported version::

    --data-path PREFIX --tokenizer-type NullTokenizer --vocab-size 257
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.data.windows import quiet

END_OF_DOCUMENT = 256
VOCAB_SIZE = 257

PYTHON_DOMAINS = ("prose", "code")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``megatron-sharpness tokenize``."""
    parser.add_argument(
        "prefix", type=Path, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx"
    )
    parser.add_argument(
        "--python-docs",
        nargs="+",
        choices=PYTHON_DOMAINS,
        default=[],
        metavar="DOMAIN",
        help="text that every Python has: 'prose', the language reference, and 'code', the "
        "standard library's sources, one document for each topic or file",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="text files, one document each",
    )
    parser.add_argument(
        "--jsonl",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="JSON lines files, one document a line",
    )
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="where a JSON line holds its text (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        metavar="N",
        help="stop after N bytes of text; the last document is cut (default: no limit)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Tokenize the sources in the order: Python's, text, JSON lines."""
    if arguments.max_bytes is not None and arguments.max_bytes < 1:
        raise InputError(f"--max-bytes {arguments.max_bytes}: must be at least 1")
    documents = documents_of(arguments)
    if arguments.max_bytes is not None:
        documents = _first_bytes(documents, arguments.max_bytes)
    number, tokens = write_dataset(arguments.prefix, _with_progress(documents))
    print(
        f"{arguments.prefix}.bin, .idx: {number:,} documents, {tokens:,} tokens. Train on it with\n"
        f"    --data-path {arguments.prefix} --tokenizer-type NullTokenizer "
        f"--vocab-size {VOCAB_SIZE}"
    )


def python_prose() -> Iterator[bytes]:
    """The topics of Python's language reference, as ``help()`` shows them, by name."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        raise InputError(
            "--python-docs prose: this Python was installed without pydoc_data; use another "
            "Python, or --text with files of your own"
        ) from None
    for name in sorted(topics):
        yield topics[name].encode()


def python_code() -> Iterator[bytes]:
    """The standard library's modules but for its own tests, by path."""
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = sorted(name for name in subfolders if name not in skipped)
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(folder, name).read_bytes()


def write_dataset(prefix: Path, documents: Iterable[bytes]) -> tuple[int, int]:
    """Write ``prefix.bin`` and ``prefix.idx``; the number of documents and of tokens.

    Empty documents are left out. Files of these names are replaced only by complete ones.

    Raises:
        InputError: there is no text, the place cannot be written, or megatron-core is missing.
    """
    try:
        with quiet():
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    except ModuleNotFoundError as error:
        raise InputError(
            f"Megatron's dataset format needs megatron-core ({error}); pip install megatron-core"
        ) from error
    import numpy as np
    import torch

    number = tokens = 0
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=prefix.parent, prefix=".tokenize-") as folder:
            partial = Path(folder, "partial")
            builder = IndexedDatasetBuilder(f"{partial}.bin", dtype=DType.optimal_dtype(VOCAB_SIZE))
            for document in documents:
                if not document:
                    continue
                ids = np.empty(len(document) + 1, dtype=np.int16)
                ids[:-1] = np.frombuffer(document, dtype=np.uint8)
                ids[-1] = END_OF_DOCUMENT
                builder.add_document(torch.from_numpy(ids), [len(ids)])
                number += 1
                tokens += len(ids)
            if not number:
                raise InputError("no text: every source given is empty")
            builder.finalize(f"{partial}.idx")
            for suffix in (".bin", ".idx"):
                os.replace(f"{partial}{suffix}", f"{prefix}{suffix}")
    except OSError as error:
        raise InputError(
            f"{prefix}: cannot be written ({error.strerror}); choose another PREFIX"
        ) from error
    return number, tokens


def documents_of(arguments: argparse.Namespace) -> Iterator[bytes]:
    """The text of all documents that the flags name, in the order of :func:`run`.

    Raises:
        InputError: no source is named, a file is missing, or there is no text in any.
    """
    files = [("--text", path) for path in arguments.text]
    files += [("--jsonl", path) for path in arguments.jsonl]
    if not (arguments.python_docs or files):
        raise InputError("nothing to tokenize: give --python-docs, --text or --jsonl")
    for flag, path in files:  # before hours of work on the others
        if not path.is_file():
            reason = "it is a folder" if path.is_dir() else "no such file"
            raise InputError(f"{flag} {path}: {reason}; give a file of text")
    documents = _read(arguments)
    blank: list[bytes] = []
    for document in documents:
        if document and not document.isspace():
            return itertools.chain([*blank, document], documents)
        blank.append(document)
    shown = ", ".join(f"{flag} {path}" for flag, path in files)
    reason = "empty but for white space" if any(blank) else "empty"
    raise InputError(f"{shown or '--python-docs'}: {reason}; give a file that has text")


def _read(arguments: argparse.Namespace) -> Iterator[bytes]:
    for domain in arguments.python_docs:
        yield from python_prose() if domain == "prose" else python_code()
    for path in arguments.text:
        with _open("--text", path) as file:
            yield file.read()
    for path in arguments.jsonl:
        yield from _json_texts(path, arguments.json_key)


def _open(flag: str, path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(
            f"{flag} {path}: cannot be read ({error.strerror}); give a file that can"
        ) from error


def _json_texts(path: Path, key: str) -> Iterator[bytes]:
    with _open("--jsonl", path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(
                    f"--jsonl {path}, line {number}: not JSON ({error}); write one object a line, "
                    "or give the file by --text"
                ) from error
            text = record.get(key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise InputError(
                    f"--jsonl {path}, line {number}: no text under the key {key!r}; "
                    "name the right one with --json-key"
                )
            yield text.encode(errors="replace")


def _first_bytes(documents: Iterator[bytes], limit: int) -> Iterator[bytes]:
    for document in documents:
        yield document[:limit]
        limit -= len(document)
        if limit <= 0:
            return


def _with_progress(documents: Iterable[bytes]) -> Iterator[bytes]:
    for number, document in enumerate(documents, start=1):
        if sys.stderr.isatty():
            print(f"\r{number:,} documents", end="", file=sys.stderr)
        yield document
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
