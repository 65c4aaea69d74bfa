"""Documents as tokens, and the order in which a run sees them.

The sample of a number is a pure function of the seed: a resumed run goes on where it stopped,
whatever the number of processes, and there is no state to save.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sharpness.adaptive_mix.mixture import Mixture
from megatron_sharpness.core.errors import InputError

# Shared with `megatron-sharpness tokenize`.
from megatron_sharpness.data.tokenize import END_OF_DOCUMENT, PYTHON_DOMAINS, documents_of
from megatron_sharpness.data.windows import Windows, read_indexed

Tokens = npt.NDArray[Any]
Tokenize = Callable[[bytes], Tokens]
Documents = Sequence[Tokens]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that name the data: one of the three kinds."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-path",
        nargs="+",
        metavar="PREFIX",
        help="PREFIX.bin and PREFIX.idx in Megatron's format (`megatron-sharpness tokenize` or "
        "Megatron's preprocess_data.py writes them), read from disk as needed; or a mix, WEIGHT "
        "PREFIX WEIGHT PREFIX …",
    )
    group.add_argument(
        "--python-docs",
        nargs="+",
        choices=PYTHON_DOMAINS,
        default=[],
        help="text that every Python has: the language reference, the standard library's sources",
    )
    group.add_argument(
        "--text", nargs="+", type=Path, default=[], metavar="FILE", help="one document each"
    )
    group.add_argument(
        "--jsonl", nargs="+", type=Path, default=[], metavar="FILE", help="one document a line"
    )
    group.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="where JSON lines or a Hugging Face dataset hold their text (default: %(default)s)",
    )
    group.add_argument(
        "--hf-dataset",
        nargs="+",
        metavar=("NAME_OR_FOLDER", "CONFIGURATION"),
        help="a Hugging Face dataset, tokenized once into its cache",
    )
    group.add_argument("--hf-dataset-split", default="train", metavar="SPLIT")
    group.add_argument(
        "--hf-dataset-streaming",
        action="store_true",
        help="read it as it comes, without downloading it first: its own order, not shuffled",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse no data, or two kinds of it.

    Raises:
        InputError: names the flags and the remedy.
    """
    kinds = {
        "--data-path": args.data_path,
        "--python-docs, --text or --jsonl": args.python_docs or args.text or args.jsonl,
        "--hf-dataset": args.hf_dataset,
    }
    given = [flags for flags, value in kinds.items() if value]
    if not given:
        raise InputError(f"no data: give {', '.join(kinds)}")
    if len(given) > 1:
        raise InputError(
            f"{' and '.join(given)}: these are read in different ways; give one of them"
        )
    for prefix, _ in components(args) if args.data_path else ():
        for suffix in (".bin", ".idx"):
            if not Path(prefix + suffix).is_file():
                raise InputError(
                    f"--data-path {prefix}: there is no {prefix}{suffix}; give the path of both "
                    "without the suffix"
                )


def components(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Prefixes and weights of ``--data-path``, the weights adding up to 1.

    Raises:
        InputError: they do not alternate, or are no weights.
    """
    given = args.data_path
    if len(given) == 1:
        return [(given[0], 1.0)]
    shown = f"--data-path {' '.join(given)}"
    try:
        weights = [float(text) for text in given[::2]]
    except ValueError:
        weights = []
    if len(given) % 2 or not weights:
        raise InputError(f"{shown}: a mix alternates; give WEIGHT PREFIX WEIGHT PREFIX …")
    if not all(0.0 <= weight < float("inf") for weight in weights) or not sum(weights) > 0.0:
        raise InputError(f"{shown}: weights are not negative, and some are positive")
    return [(p, w / sum(weights)) for p, w in zip(given[1::2], weights, strict=True)]


def bytes_as_tokens(document: bytes) -> Tokens:
    """One token a byte, and the end of the document."""
    ids = np.empty(len(document) + 1, dtype=np.uint16)
    ids[:-1] = np.frombuffer(document, dtype=np.uint8)
    ids[-1] = END_OF_DOCUMENT
    return ids


def tokens_of(tokenizer: Any) -> Tokenize:
    """A Hugging Face tokenizer as a function; documents end with its end-of-text token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(document: bytes) -> Tokens:
        text = document.decode(errors="replace")
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.array(ids + end, dtype=np.int32)

    return tokenize


def read_samples(args: argparse.Namespace, tokenize: Tokenize) -> Samples | Blend | Stream:
    """What the run trains on, in its order.

    Raises:
        InputError: the data cannot be read, or a package that reads it is missing.
    """
    if args.hf_dataset and args.hf_dataset_streaming:
        return Stream(_loaded(args, streaming=True), args.json_key, tokenize, args.seq_length)
    if not args.data_path:
        return Samples(*_read_documents(args, tokenize), args.seq_length, args.seed)
    parts = []
    for prefix, weight in components(args):
        documents, lengths = read_indexed(prefix, f"--data-path {prefix}")
        parts.append((Samples(documents, lengths, args.seq_length, args.seed), weight))
    return parts[0][0] if len(parts) == 1 else Blend(parts, args.seed)


def _read_documents(args: argparse.Namespace, tokenize: Tokenize) -> tuple[Documents, Tokens]:
    """All documents as tokens, and the length of each.

    Raises:
        InputError: the data cannot be read, or a package that reads it is missing.
    """
    if args.hf_dataset:
        return _hugging_face(args, tokenize)
    documents = [tokenize(document) for document in documents_of(args)]
    return documents, np.array([len(document) for document in documents])


def _loaded(args: argparse.Namespace, *, streaming: bool = False) -> Any:
    """The split of a Hugging Face dataset, which has the column that holds text."""
    name, key = args.hf_dataset[0], args.json_key
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise InputError(
            f"--hf-dataset {name}: it is read with datasets ({error}); pip install datasets"
        ) from error
    try:
        for folder in (Path(name), Path(name, args.hf_dataset_split)):
            if (folder / "state.json").exists():  # written by save_to_disk
                dataset = datasets.load_from_disk(str(folder))
                dataset = dataset.to_iterable_dataset() if streaming else dataset
                break
        else:
            dataset = datasets.load_dataset(
                *args.hf_dataset, split=args.hf_dataset_split, streaming=streaming
            )
    except (OSError, ValueError) as error:
        raise InputError(
            f"--hf-dataset {' '.join(args.hf_dataset)}, --hf-dataset-split "
            f"{args.hf_dataset_split}: {error}"
        ) from error
    columns = dataset.column_names or list(next(iter(dataset), ()))  # a stream may not know them
    if key not in columns:
        raise InputError(
            f"--json-key {key}: --hf-dataset {name} has the columns {', '.join(columns)}; name the "
            "one that holds text"
        )
    return dataset


def _hugging_face(args: argparse.Namespace, tokenize: Tokenize) -> tuple[Documents, Tokens]:
    dataset = _loaded(args)
    import datasets
    from filelock import FileLock

    def tokenized(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokenize(row[args.json_key].encode(errors="replace"))
        return {"tokens": ids, "length": len(ids)}

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "train_fsdp.lock"):  # one process tokenizes, the others find it done
        dataset = dataset.map(tokenized, remove_columns=dataset.column_names)
    dataset = dataset.with_format("numpy")
    return _Column(dataset, "tokens"), np.asarray(dataset["length"][:])


class _Column(Sequence[Tokens]):
    """One column of a Hugging Face dataset, read a row at a time."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._name = dataset, name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[int(index)][self._name]


class Samples:
    """Documents in a row, cut into samples, which each epoch shuffles anew.

    Args:
        documents: token ids.
        lengths: of the documents.
        length: tokens a sample predicts; it holds one more, which the next one begins with.
        seed: of the order.

    Raises:
        InputError: there is less than one sample.
    """

    def __init__(self, documents: Documents, lengths: Tokens, length: int, seed: int) -> None:
        self.windows, self.seed = Windows(documents, lengths, length), seed
        self.count = len(self.windows)
        if self.count < 1:
            raise InputError(
                f"--seq-length {length}: a sample takes {length + 1} tokens, and the data has "
                f"{self.windows.tokens}, the ends of documents counted; give more text or a "
                "shorter sequence"
            )
        self._order = functools.lru_cache(maxsize=1)(self._shuffled)

    def __getitem__(self, number: int) -> Tokens:
        """Sample ``number`` of the run, counted from 0; shape [length + 1], int64."""
        epoch, index = divmod(number, self.count)
        return self.windows[int(self._order(epoch)[index])]

    def _shuffled(self, epoch: int) -> Tokens:
        return np.random.default_rng((self.seed, epoch)).permutation(self.count)


class Stream:
    """Documents as they come, cut into samples one after the other; at its end it begins anew.

    Args:
        rows: what is iterated over, each row with a text under ``key``.
        key: of the text.
        tokenize: a document.
        length: tokens a sample predicts; it holds one more, which the next one begins with.
    """

    count = None  # not known before it has been read

    def __init__(self, rows: Iterable[Any], key: str, tokenize: Tokenize, length: int) -> None:
        self._rows, self._key, self._tokenize, self.length = rows, key, tokenize, length
        self._read = self._samples()
        self._next = 0

    def __getitem__(self, number: int) -> Tokens:
        """Sample ``number`` of the run, counted from 0; shape [length + 1], int64. Those that are
        passed over are read, and what lies behind is read anew from the beginning."""
        if number < self._next:
            self._read, self._next = self._samples(), 0
        for _ in range(number - self._next):
            next(self._read)
        self._next = number + 1
        return next(self._read)

    def _samples(self) -> Iterator[Tokens]:
        held = np.empty(0, dtype=np.int64)
        while True:
            read = 0
            for row in self._rows:
                ids = self._tokenize(row[self._key].encode(errors="replace"))
                read += len(ids)
                held = np.concatenate([held, ids.astype(np.int64)])
                while len(held) > self.length:
                    yield held[: self.length + 1]
                    held = held[self.length :]
            if not read:
                raise InputError("--hf-dataset: the stream holds no text")


class Blend:
    """Samples of several kinds of data, each drawn with the probability that is its weight.

    Args:
        parts: samples and weights, which add up to 1.
        seed: of what is drawn.
    """

    def __init__(self, parts: Sequence[tuple[Samples, float]], seed: int) -> None:
        self.parts = [samples for samples, _ in parts]
        self.count = sum(samples.count for samples in self.parts)
        self.mixture = Mixture([weight for _, weight in parts], seed)

    def __getitem__(self, number: int) -> Tokens:
        """Sample ``number`` of the run, counted from 0; shape [length + 1], int64."""
        component, own_number = self.mixture[number]
        return self.parts[component][own_number]
