"""Evaluation data: what is read, what counts, and what is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_sharpness.arguments import check_evaluation
from megatron_sharpness.core.errors import InputError
from megatron_sharpness.data.evaluation import EvaluationSet, byte_tokens, parse, read
from megatron_sharpness.data.tokenize import END_OF_DOCUMENT, VOCAB_SIZE, write_dataset

TEXTS = [bytes(range(65, 91)) * 3, b"", b"second document " * 5, b"and a third one" * 9]


def evaluation_set(path: Path, **options: object) -> EvaluationSet:
    given = {
        "samples": 4, "length": 16, "seed": 1, "tokenize": byte_tokens, "end": END_OF_DOCUMENT,
        "vocabulary": VOCAB_SIZE, **options,
    }  # fmt: skip
    return read("some", path, **given)  # type: ignore[arg-type]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    write_dataset(tmp_path / "text", TEXTS)
    return tmp_path / "text"


def answers(tmp_path: Path, *pairs: tuple[str, str], **keys: str) -> Path:
    path = tmp_path / "pairs.jsonl"
    first, second = keys.get("prompt", "question"), keys.get("answer", "answer")
    path.write_text("".join(json.dumps({first: p, second: a}) + "\n" for p, a in pairs) + "\n")
    return path


def test_windows_are_of_the_text_and_all_of_them_count(prefix: Path) -> None:
    found = evaluation_set(prefix)
    stream = [t for text in TEXTS if text for t in [*text, END_OF_DOCUMENT]]
    assert found.tokens.shape == (4, 17) and found.tokens.dtype == np.int64
    starts = set()
    for row in found.tokens.tolist():
        start = next(i for i in range(0, len(stream), 16) if stream[i : i + 17] == row)
        starts.add(start)
    assert len(starts) == 4  # none of them twice
    assert found.mask.shape == (4, 16) and found.mask.all()


def test_the_seed_and_the_name_fix_the_samples(prefix: Path) -> None:
    first, again = evaluation_set(prefix), evaluation_set(prefix)
    assert np.array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, evaluation_set(prefix, seed=2).tokens)


def test_of_a_prompt_and_an_answer_only_the_answer_counts(tmp_path: Path) -> None:
    found = evaluation_set(answers(tmp_path, ("1+1=", "2"), ("say hi:", "hi")), samples=2)
    for row, (prompt, answer) in enumerate([("1+1=", "2"), ("say hi:", "hi")]):
        whole = [*prompt.encode(), *answer.encode(), END_OF_DOCUMENT]
        assert found.tokens[row, : len(whole)].tolist() == whole
        counted = found.tokens[row, 1:][found.mask[row] > 0].tolist()
        assert counted == [*answer.encode(), END_OF_DOCUMENT]


@pytest.mark.parametrize("answer", ["answer", "completion", "response"])
def test_prompts_and_answers_have_their_usual_names(tmp_path: Path, answer: str) -> None:
    path = answers(tmp_path, ("a", "b"), prompt="prompt", answer=answer)
    assert evaluation_set(path, samples=1).mask.sum() == 2


def test_what_is_too_long_too_little_or_unknown_is_refused(tmp_path: Path, prefix: Path) -> None:
    with pytest.raises(InputError, match=r"some=.*pairs.jsonl: line 1 has 31 tokens.*--seq-length"):
        evaluation_set(answers(tmp_path, ("x" * 20, "y" * 10)), samples=1)
    with pytest.raises(InputError, match="has 1 lines, and 4 samples are asked for"):
        evaluation_set(answers(tmp_path, ("x", "y")))
    with pytest.raises(InputError, match=r"tokens, .* samples of 16, and 400 are asked for; give"):
        evaluation_set(prefix, samples=400)
    with pytest.raises(InputError, match=r"it holds token 256, and the model knows 256"):
        evaluation_set(prefix, samples=10, vocabulary=256)
    with pytest.raises(InputError, match="empty prompt or answer"):
        evaluation_set(answers(tmp_path, ("", "y")), samples=1)


@pytest.mark.parametrize("line", ["not json", '{"prompt": "x"}', '{"prompt": 1, "answer": "y"}'])
def test_a_line_that_is_no_prompt_and_answer_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "x", "answer": "y"}\n' + line)
    with pytest.raises(InputError, match="line 2 is no JSON object with texts under prompt or"):
        evaluation_set(path, samples=1)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(InputError, match="has 0 lines"):
        evaluation_set(path, samples=1)


@pytest.mark.parametrize("content", [b"", b"not an index", b"MMIDIDX\x00\x00"])
def test_an_index_that_is_none_or_cut_off_is_refused(prefix: Path, content: bytes) -> None:
    prefix.with_suffix(".idx").write_bytes(content)
    with pytest.raises(InputError, match=rf"eval-data some=.*{prefix}\.idx cannot be read"):
        evaluation_set(prefix)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["code"], "give NAME=PREFIX"),
        (["code="], "give NAME=PREFIX"),
        (["train=here"], "'train' is the step's own batch"),
        (["a/b=here"], "give one of letters"),
        (["code=/no/such"], r"there is no /no/such\.bin; give a file of JSON lines"),
        (["code=/no/such.jsonl"], r"there is no /no/such\.jsonl"),
    ],
)
def test_a_bad_source_is_refused_by_flag(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=f"--critical-sharpness-eval-data .*{message}"):
        parse(texts)


def test_a_name_is_given_once(tmp_path: Path) -> None:
    path = answers(tmp_path, ("x", "y"))
    assert parse([f"a={path}", f"b={path}"]) == {"a": path, "b": path}
    with pytest.raises(InputError, match="there are two of the name a"):
        parse([f"a={path}", f"a={path}"])


def namespace(**given: object) -> argparse.Namespace:
    absent = ("critical_sharpness_eval_samples", "critical_sharpness_frozen", "save")
    defaults = {"critical_sharpness_eval_data": [], "global_batch_size": 8}
    return argparse.Namespace(**{**dict.fromkeys(absent), **defaults, **given})


def test_the_number_of_samples_is_the_batch_size_or_a_multiple_of_what_ranks_take() -> None:
    args = namespace()
    check_evaluation(args, 4)
    assert args.critical_sharpness_eval_samples == 8
    with pytest.raises(InputError, match=r"--critical-sharpness-eval-samples 6: .* 4 at a time"):
        check_evaluation(namespace(critical_sharpness_eval_samples=6), 4)
    with pytest.raises(InputError, match="--critical-sharpness-eval-samples 0"):
        check_evaluation(namespace(critical_sharpness_eval_samples=0), 4)


def test_a_frozen_run_saves_nothing() -> None:
    with pytest.raises(InputError, match=r"--critical-sharpness-frozen 3: .*leave out --save"):
        check_evaluation(namespace(critical_sharpness_frozen=3, save="there"), 4)
    with pytest.raises(InputError, match="--critical-sharpness-frozen -1"):
        check_evaluation(namespace(critical_sharpness_frozen=-1), 4)
