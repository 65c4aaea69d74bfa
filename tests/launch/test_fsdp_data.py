"""What ``launch/fsdp/train.py`` reads, and in which order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.data.tokenize import END_OF_DOCUMENT, write_dataset
from tests.launch.test_fsdp import PLAIN, TEXT, installed, parse
from tests.processes import ROOT

sys.path.insert(0, str(ROOT / "launch"))

from fsdp import data

DATASETS = installed("datasets", "hf", "torchtitan")
NO_DATA = PLAIN.replace(TEXT, "--json-key body")


def in_a_process(paths: list[str] | None, *arguments: str, **variables: str) -> None:
    """A function of ``fsdp_worker``, with packages of ``paths``."""
    if paths is None:
        pytest.skip('not installed: pip install ".[hf]"')
    search = os.pathsep.join([str(ROOT), *paths])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.launch.fsdp_worker", *arguments],
        env=os.environ | {"PYTHONPATH": search, "RANK": "0", "WORLD_SIZE": "2"} | variables,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def test_an_epoch_is_every_sample_once_and_each_is_shuffled_anew() -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(100, size=size) for size in (5, 0, 1, 90, 2, 40)]
    lengths = np.array([len(document) for document in documents])
    text = np.concatenate(documents)
    samples = data.Samples(documents, lengths, 8, seed=1)
    assert samples.count == 17
    expected = {tuple(text[start : start + 9]) for start in range(0, 17 * 8, 8)}
    epochs = [[tuple(samples[17 * epoch + i]) for i in range(17)] for epoch in range(2)]
    assert set(epochs[0]) == set(epochs[1]) == expected
    assert epochs[0] != epochs[1]
    again = data.Samples(documents, lengths, 8, seed=1)
    assert tuple(again[20]) == epochs[1][3]


def test_a_blend_draws_each_kind_by_its_weight_and_none_of_its_samples_twice() -> None:
    documents = {kind: [np.full(801, kind) + np.arange(801)] for kind in (0, 1000, 5000)}
    parts = [
        (data.Samples(text, np.array([801]), 8, seed=1), weight)
        for text, weight in zip(documents.values(), (0.5, 0.2, 0.3), strict=True)
    ]
    blend = data.Blend(parts, seed=1)
    drawn = [tuple(blend[i]) for i in range(100)]
    assert len(set(drawn)) == 100
    part = [sum(low <= sample[0] < high for sample in drawn) / 100
            for low, high in ((0, 1000), (1000, 5000), (5000, 9000))]  # fmt: skip
    assert part == pytest.approx([0.5, 0.2, 0.3], abs=0.12)
    again = data.Blend(parts, seed=1)  # wherever a resumed run begins
    assert [tuple(again[i]) for i in (2000, 99, 3)] == [tuple(blend[2000]), drawn[99], drawn[3]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("1 a 2", "a mix alternates"),
        ("a b", "a mix alternates"),
        ("-1 a 2 b", "weights are not negative"),
        ("0 a 0 b", "some are positive"),
        ("1 /no/such 1 /nor/this", "there is no /no/such.bin"),
    ],
)
def test_a_bad_mix_is_refused(
    given: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=f"--data-path .*{message}"):
        parse(monkeypatch, f"{NO_DATA} --data-path {given}")


TEXTS = ["Once upon a time", "there was a λ", "and it was sharp."]


def json_lines(folder: Path) -> Path:
    """The texts, alone in a folder."""
    file = folder / "data" / "train.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return file


def samples_of(monkeypatch: pytest.MonkeyPatch, flags: str) -> list[list[int]]:
    args = parse(monkeypatch, f"{NO_DATA} {flags}")
    args.seq_length, args.seed = 8, 1
    samples = data.read_samples(args, data.bytes_as_tokens)
    assert samples.count == (sum(len(text.encode()) + 1 for text in TEXTS) - 1) // 8
    return [samples[i].tolist() for i in range(samples.count)]


def test_megatrons_format_holds_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    write_dataset(tmp_path / "tokens", [text.encode() for text in TEXTS])
    indexed = samples_of(monkeypatch, f"--data-path {tmp_path / 'tokens'}")
    assert indexed == samples_of(monkeypatch, f"--jsonl {json_lines(tmp_path)}")


def test_a_hugging_face_dataset_holds_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = json_lines(tmp_path)
    in_a_process(
        DATASETS, "dataset", str(file.parent), str(tmp_path), *NO_DATA.split(),
        HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    of_files, of_disk, of_splits, *streams = json.loads((tmp_path / "samples.json").read_text())
    assert of_files == of_disk == of_splits == samples_of(monkeypatch, f"--jsonl {file}")
    tokens = [token for text in TEXTS for token in [*text.encode(), END_OF_DOCUMENT]]
    twice = tokens * 2
    in_a_row = [twice[start : start + 9] for start in range(0, 8 * (len(of_files) + 2), 8)]
    assert streams == [in_a_row, in_a_row]


@pytest.mark.parametrize("text", ["once", "a sample", "of as many tokens as two"])
def test_a_stream_begins_anew_wherever_it_ends(text: str) -> None:
    samples = data.Stream([{"text": text}], "text", data.bytes_as_tokens, 5)
    endless = [*text.encode(), END_OF_DOCUMENT] * 60
    for number in range(40):
        assert samples[number].tolist() == endless[5 * number : 5 * number + 6]


def test_a_stream_without_text_is_refused() -> None:
    with pytest.raises(InputError, match="--hf-dataset: the stream holds no text"):
        data.Stream([], "text", data.bytes_as_tokens, 5)[0]
