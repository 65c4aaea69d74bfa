"""Documents of tokens in a row, cut into windows: what samples of text are made of."""

from __future__ import annotations

import contextlib
import logging
import struct
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sharpness.core.errors import InputError


class Windows:
    """Windows of documents in a row; each begins with the last token of the one before.

    Args:
        documents: token ids, an array each.
        lengths: of the documents.
        length: tokens that a window predicts; it holds one more.
    """

    def __init__(self, documents: Sequence[Any], lengths: npt.ArrayLike, length: int) -> None:
        self.documents, self.length = documents, length
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        #: Of all documents.
        self.tokens = int(self._starts[-1])

    def __len__(self) -> int:
        return max(self.tokens - 1, 0) // self.length

    def __getitem__(self, number: int) -> npt.NDArray[np.int64]:
        """Window ``number``, counted from 0; shape [length + 1]."""
        start, missing = number * self.length, self.length + 1
        pieces = []
        document = int(np.searchsorted(self._starts, start, side="right")) - 1
        while missing:
            offset = start - int(self._starts[document])
            piece = self.documents[document][offset : offset + missing]
            pieces.append(piece)
            missing -= len(piece)
            start += len(piece)
            document += 1
        return np.concatenate(pieces).astype(np.int64)


def read_indexed(prefix: str, shown: str) -> tuple[Sequence[Any], npt.NDArray[Any]]:
    """Documents of Megatron's ``prefix.bin`` and ``prefix.idx``, and the length of each.

    They are read from disk as needed.

    Args:
        prefix: of the files.
        shown: flag and value, for an error.

    Raises:
        InputError: megatron-core is missing, or the files are not in its format.
    """
    try:
        with quiet():
            from megatron.core.datasets.indexed_dataset import IndexedDataset
    except ModuleNotFoundError as error:
        raise InputError(
            f"{shown}: Megatron's format is read with megatron-core ({error}); "
            "pip install megatron-core, or give JSON lines"
        ) from error
    try:
        with quiet():
            dataset = IndexedDataset(prefix)
    except (AssertionError, OSError, ValueError, struct.error) as error:
        raise InputError(
            f"{shown}: {prefix}.idx cannot be read ({error}); write both files anew "
            "(megatron-sharpness tokenize, or Megatron's preprocess_data.py)"
        ) from error
    return dataset, np.array(dataset.sequence_lengths)  # a copy: its own is unmapped with it


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that Megatron and torch warn of is said: no GPU and no ranks are needed for files."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
