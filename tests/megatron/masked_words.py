"""BERT's or T5's script of a checkout on made-up words, which Megatron has no mock data for.

Run as a training script; ``MASKED_WORDS`` names the checkout's. Its tokenizer, too, would have to
come from elsewhere.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

#: Below it the identifiers are special; so many words there are in all.
FIRST_WORD, WORDS = 32, 127


class Tokenizer:
    """The part of a tokenizer that masking needs: special tokens, and each word's text."""

    pad, cls, sep, mask, bos, eos, eod = 0, 1, 2, 3, 4, 5, 5
    additional_special_tokens_ids = tuple(range(6, FIRST_WORD))
    vocab_size = WORDS
    inv_vocab = {number: f"word{number}" for number in range(WORDS)}  # noqa: RUF012
    unique_identifiers = {"class": "Tokenizer"}  # noqa: RUF012


def write_words(prefix: Path) -> None:
    """Two hundred documents of six sentences, the same by whichever rank comes last."""
    own = f"{prefix}{os.environ['RANK']}"
    generator = torch.Generator().manual_seed(0)
    builder = IndexedDatasetBuilder(f"{own}.bin", dtype=np.int32)
    for _ in range(200):
        for _ in range(6):
            builder.add_item(torch.randint(FIRST_WORD, WORDS, (9,), generator=generator))
        builder.end_document()
    builder.finalize(f"{own}.idx")
    for suffix in (".bin", ".idx"):
        os.replace(own + suffix, prefix.with_suffix(suffix))


def build_tokenizer(args: Any, **kwargs: Any) -> Tokenizer:
    return Tokenizer()


def tokenizer_module() -> Any:
    try:
        return importlib.import_module("megatron.core.tokenizers.utils.build_tokenizer")
    except ModuleNotFoundError:  # core_v0.16
        return importlib.import_module("megatron.core.tokenizers.text.utils.build_tokenizer")


if __name__ == "__main__":
    write_words(Path("words"))
    tokenizer_module().build_tokenizer = build_tokenizer
    script = os.environ["MASKED_WORDS"]
    sys.argv = [script, *sys.argv[1:], "--data-path", "words"]
    runpy.run_path(script, run_name="__main__")
