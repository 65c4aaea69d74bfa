"""Megatron-Bridge's other data: what its callback is given, as samples for the run's model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_sharpness.arguments import interleaved_group
from megatron_sharpness.core.errors import InputError, SettingError
from megatron_sharpness.data import evaluation
from megatron_sharpness.data.evaluation import EvaluationSet

#: What the micro-batches of Bridge's finetuning hold beside what a GPT reads: texts, and where the
#: sequences of a packed one lie (under two sets of names). Other data are passed without: their
#: samples are not packed.
FINETUNING = frozenset(
    {"contexts", "context_lengths", "answers", "metadata", "token_count"}
    | {f"cu_seqlens_{kind}{padded}" for kind in ("q", "kv") for padded in ("", "_padded")}
    | {"max_seqlen_q", "max_seqlen_kv", "cu_seqlens", "cu_seqlens_argmin", "max_seqlen"}
    | {"cu_seqlens_unpadded", "cu_seqlens_unpadded_argmin"}
)


def sources(given: Mapping[str, str | Path]) -> dict[str, Path]:
    """Paths by name, checked: the files are there.

    Raises:
        InputError: a name or a path cannot be used.
    """
    with _as_settings():
        return evaluation.parse([f"{name}={path}" for name, path in given.items()])


def evaluation_sets(
    state: Any, options: Any, paths: Mapping[str, Path], samples: int | None
) -> list[EvaluationSet]:
    """The samples that Megatron-LM draws from the same files with the same seed.

    Args:
        state: Bridge's global one.
        options: of the model.
        paths: by name.
        samples: how many of each; a global batch if None.

    Raises:
        InputError: their number does not fit, or a file's content.
    """
    cfg, tokenizer = state.cfg, state.tokenizer
    count = cfg.train.global_batch_size if samples is None else samples
    group = interleaved_group(options)
    at_once = cfg.train.micro_batch_size * cfg.data_parallel_size * group
    if isinstance(count, bool) or not isinstance(count, int) or count < 1 or count % at_once:
        raise SettingError(
            "eval_samples", count,
            f"all data-parallel ranks together take {at_once} at a time; give a multiple of that",
        )  # fmt: skip
    # The NullTokenizer reads numbers; ours are the bytes that `tokenize` writes.
    is_bytes = cfg.tokenizer.tokenizer_type == "NullTokenizer"
    with _as_settings():
        return [
            evaluation.read(
                name,
                path,
                samples=count,
                length=cfg.model.seq_length,
                seed=cfg.rng.seed,
                tokenize=evaluation.byte_tokens if is_bytes else tokenizer.tokenize,
                end=tokenizer.eod,
                vocabulary=cfg.model.vocab_size,
            )
            for name, path in paths.items()
        ]


@contextlib.contextmanager
def _as_settings() -> Iterator[None]:
    """What is wrong with other data, in the words of the callback."""
    words = {
        evaluation.FLAG: "eval_data",
        "--critical-sharpness-eval-samples": "eval_samples",
        "--seq-length": "seq_length",
    }
    try:
        yield
    except InputError as error:
        said = str(error)
        for flag, word in words.items():
            said = said.replace(flag, word)
        raise InputError(said) from None
