"""Fixed evaluation batches of named data: what a loss on other data is computed on.

``NAME=PREFIX`` is text in Megatron's indexed format, of which the seed draws windows;
``NAME=FILE.jsonl`` holds a prompt and an answer a line, and only the answer's tokens count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_sharpness.core.errors import InputError, SettingError
from megatron_sharpness.core.settings import check_names
from megatron_sharpness.data.windows import Windows, read_indexed

FLAG = "--critical-sharpness-eval-data"

#: Keys of a JSON line, the first that it has.
PROMPT_KEYS, ANSWER_KEYS = ("prompt", "question"), ("answer", "completion", "response")

#: A text's tokens, without what marks its end.
Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class EvaluationSet:
    """Samples of one kind of data.

    Attributes:
        name: of the data.
        tokens: int64, shape [samples, length + 1]: the inputs, and one further by one the labels.
        mask: fp32, shape [samples, length]: 1 for the labels that count.
    """

    name: str
    tokens: npt.NDArray[np.int64]
    mask: npt.NDArray[np.float32]


def parse(texts: Sequence[str]) -> dict[str, Path]:
    """Names and paths of ``NAME=PATH``, checked: the files are there.

    Raises:
        InputError: names the flag, the value, the reason and the remedy.
    """
    sources: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise _bad(text, "give NAME=PREFIX, or NAME=FILE.jsonl")
        if name in sources:
            raise _bad(text, f"there are two of the name {name}; give each its own")
        try:
            check_names([name])
        except SettingError as error:
            raise _bad(text, error.reason) from None
        sources[name] = Path(path)
        needed = [path] if is_jsonl(Path(path)) else [path + ".bin", path + ".idx"]
        for file in needed:
            if not Path(file).is_file():
                raise _bad(
                    text,
                    f"there is no {file}; give a file of JSON lines, or the path of Megatron's "
                    ".bin and .idx without the suffix",
                )
    return sources


def read(
    name: str,
    path: Path,
    *,
    samples: int,
    length: int,
    seed: int,
    tokenize: Tokenize,
    end: int | None,
    vocabulary: int,
) -> EvaluationSet:
    """The samples of one source, the same ones for the same arguments.

    Args:
        name: of the data.
        path: the prefix, or the file of JSON lines.
        samples: how many.
        length: tokens that a sample predicts at most.
        seed: of which are drawn.
        tokenize: for JSON lines.
        end: the token that ends an answer, which counts too.
        vocabulary: of the model.

    Raises:
        InputError: there is too little, a line that is no prompt and answer or is too long, or a
            token that the model does not know.
    """
    shown = f"{name}={path}"
    generator = np.random.default_rng((seed, *name.encode()))
    if is_jsonl(path):
        tokens, mask = _answers(shown, path, samples, length, tokenize, end, generator)
    else:
        tokens = _windows(shown, path, samples, length, generator)
        mask = np.ones((samples, length), dtype=np.float32)
    if (largest := int(np.max(tokens))) >= vocabulary:
        raise _bad(
            shown,
            f"it holds token {largest}, and the model knows {vocabulary}; tokenize it as the "
            "training data was",
        )
    return EvaluationSet(name, tokens, mask)


def is_jsonl(path: Path) -> bool:
    return path.suffix in (".jsonl", ".json")


def byte_tokens(text: str) -> list[int]:
    """One token a byte, as ``megatron-sharpness tokenize`` writes them."""
    return list(text.encode(errors="replace"))


def _windows(
    shown: str, prefix: Path, samples: int, length: int, generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Windows of ``length`` + 1 tokens of the documents in a row, none of them twice."""
    windows = Windows(*read_indexed(str(prefix), f"{FLAG} {shown}"), length)
    if len(windows) < samples:
        raise _bad(
            shown,
            f"it has {windows.tokens} tokens, {len(windows)} samples of {length}, and {samples} "
            "are asked for; give more text, or fewer --critical-sharpness-eval-samples",
        )
    chosen = np.sort(generator.choice(len(windows), size=samples, replace=False))
    return np.stack([windows[int(index)] for index in chosen])


def _answers(
    shown: str,
    path: Path,
    samples: int,
    length: int,
    tokenize: Tokenize,
    end: int | None,
    generator: np.random.Generator,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """A line a sample, filled up with what does not count."""
    pairs = list(_pairs(shown, path))
    if len(pairs) < samples:
        raise _bad(
            shown,
            f"it has {len(pairs)} lines, and {samples} samples are asked for; give more, or fewer "
            "--critical-sharpness-eval-samples",
        )
    tokens = np.zeros((samples, length + 1), dtype=np.int64)
    mask = np.zeros((samples, length), dtype=np.float32)
    for row, index in enumerate(np.sort(generator.choice(len(pairs), samples, replace=False))):
        number, prompt, answer = pairs[index]
        before = list(tokenize(prompt))
        counted = [*tokenize(answer), *([] if end is None else [end])]
        both = before + counted
        if len(both) > length + 1:
            raise _bad(
                shown,
                f"line {number} has {len(both)} tokens, and --seq-length {length} is the longest "
                "that the model is trained with; leave such lines out",
            )
        if not before or not counted:
            raise _bad(shown, f"line {number} has an empty prompt or answer; leave it out")
        tokens[row, : len(both)] = both
        mask[row, len(before) - 1 : len(both) - 1] = 1.0
    return tokens, mask


def _pairs(shown: str, path: Path) -> list[tuple[int, str, str]]:
    pairs = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                prompt = next(record[key] for key in PROMPT_KEYS if key in record)
                answer = next(record[key] for key in ANSWER_KEYS if key in record)
                pairs.append((number, prompt + "", answer + ""))
            except (ValueError, TypeError, StopIteration) as error:
                raise _bad(
                    shown,
                    f"line {number} is no JSON object with texts under {' or '.join(PROMPT_KEYS)} "
                    f"and {' or '.join(ANSWER_KEYS)}; write it so",
                ) from error
    return pairs


def _bad(value: str, reason: str) -> InputError:
    return InputError(f"{FLAG} {value}: {reason}.")
