"""A series of checkpoints of real trainings: Megatron's, FSDP2's, and models of Hugging Face."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sharpness import cli
from megatron_sharpness.data.tokenize import python_prose, write_dataset
from tests.launch.test_fsdp import TRANSFORMERS
from tests.processes import ROOT, start_ranks
from tests.sweeps.checkpoints.test_command import table

MODEL = """--num-layers 2 --hidden-size 32 --num-attention-heads 4"""
TRAINING = """--seq-length 64 --micro-batch-size 4 --global-batch-size 8 --lr 1e-2 --min-lr 1e-3
--lr-decay-style cosine --lr-warmup-iters 3 --train-iters 12 --log-interval 1 --bf16"""
GPT = "--vocab-size 257 --max-position-embeddings 64 --hidden-dropout 0 --attention-dropout 0"
# Without Transformer Engine or Apex Megatron cannot load a checkpoint of its distributed optimizer.
MEGATRON = """--tokenizer-type NullTokenizer --split 100,0,0 --eval-iters 0 --eval-interval 1000
--ckpt-format torch_dist"""
#: In training every step is measured, and every fourth saved.
IN_RUN = "--measure-critical-sharpness-every 1 --save-interval 4"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text for nearly two epochs of 51 samples, which Megatron shuffles as one: its order depends
    on the length of a run."""
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "prose", [max(python_prose(), key=len)[:3300]])
    return folder


def flags(script: str, data: Path) -> list[str]:
    """Of a training on two processes."""
    given = f"{TRAINING} --data-path {data}/prose "
    if script == "megatron":
        given += f"{MODEL} {GPT} {MEGATRON} --data-cache-path {data}/cache"
        launch = ["-m", "megatron_sharpness.megatron", str(ROOT / "launch/pretrain_gpt.py")]
    else:
        given += f"{MODEL} {GPT}" if script == "fsdp" else ""
        launch = [str(ROOT / "launch/fsdp/train.py")]
    return [*launch, *given.split()]


@pytest.fixture(scope="module")
def trained(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """By script, a run's checkpoints and what it has measured."""
    made = {}
    for script in ("megatron", "fsdp"):
        folder = tmp_path_factory.mktemp(script)
        given = [*flags(script, data), *IN_RUN.split(), "--save", str(folder / "checkpoints")]
        ranks = start_ranks(
            [*given, "--critical-sharpness-log", str(folder / "log.jsonl")], folder, 2,
            environment={"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        codes = [rank.wait(timeout=180) for rank in ranks]
        assert codes == [0, 0], (folder / "output0.txt").read_text()[-4000:]
        lines = (folder / "log.jsonl").read_text().splitlines()
        made[script] = (folder / "checkpoints", [json.loads(line) for line in lines])
    return made


def torchrun() -> list[str]:
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    return [*launch, "--standalone", "--nproc-per-node", "2"]


def measure(out: Path, given: list[str], training: list[str], monkeypatch: Any) -> int:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", ":".join([str(ROOT), *(TRANSFORMERS or ())]))
    return cli.main(["checkpoints", "--out", str(out), *given, "--", *torchrun(), *training])


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("script", ["megatron", "fsdp"])
def test_with_their_own_moments_checkpoints_measure_what_the_training_did(
    script: str, data: Path, trained: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, in_run = trained[script]
    given = ["--load", str(folder), "--measure", "2"]
    assert measure(tmp_path, given, flags(script, data), monkeypatch) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert said.count("nothing has changed, sha256") == 3
    assert len({row["sha256"] for row in table(tmp_path)}) == 3
    by_iteration = {record["iteration"]: record for record in in_run}
    for iteration in (4, 8):
        # The first step that is taken back is the one that the training made next.
        first, second = records(tmp_path / f"iter_{iteration:07d}.jsonl")
        there = by_iteration[iteration + 1]
        assert first["iteration"] == there["iteration"]
        for field in ("lr", "loss", "tokens", "consumed_samples", "edge_of_stability"):
            assert first[field] == pytest.approx(there[field], rel=1e-6), field
        assert first["slope"] == pytest.approx(there["slope"], rel=1e-3)
        assert first["critical_lr"] == pytest.approx(there["critical_lr"], rel=2e-3)
        # Then they part: there the model has moved on, here it has not.
        assert second["loss"] != by_iteration[iteration + 2]["loss"]
    # Behind the end of the training, with the schedule's last rate.
    assert [r["iteration"] for r in records(tmp_path / "iter_0000012.jsonl")] == [13, 14]
    assert float(table(tmp_path)[2]["lr"]) == pytest.approx(1e-3)


@pytest.mark.parametrize("script", ["megatron", "fsdp"])
def test_with_moments_accumulated_and_a_broken_checkpoint_between(
    script: str, data: Path, trained: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, _ = trained[script]
    folder = tmp_path / "checkpoints"
    for path in source.rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            # As if the disk had been full.
            cut = path.suffix == ".distcp" and path.parent.name == "iter_0000008"
            copy.write_bytes(path.read_bytes()[: 2000 if cut else None])
    given = ["--load", str(folder), "--moments", "warm:3", "--measure", "2"]
    status = measure(tmp_path / "out", given, flags(script, data), monkeypatch)
    said = capsys.readouterr()
    assert status == 3, said
    assert "iter_0000008: skipped: the training command ended with 1" in said.out
    assert "1 of 3 were skipped: iter_0000008" in said.out
    rows = table(tmp_path / "out")
    assert [row["iteration"] for row in rows] == ["4", "12"]
    for row in rows:
        first, second = records(tmp_path / "out" / f"{row['checkpoint']}.jsonl")
        assert (first["iteration"], second["iteration"]) == (4, 5)  # after three for the moments
        assert first["lr"] == 1e-2 and row["lr"] == ""
        assert row["endings"] == "found:2"
    # All checkpoints see the same batches.
    tokens = [records(tmp_path / "out" / f"{r['checkpoint']}.jsonl")[0]["tokens"] for r in rows]
    assert tokens == [8 * 64] * 2


def test_an_olmo_2_of_the_hugging_face_format(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if TRANSFORMERS is None:
        pytest.skip('transformers is not installed: pip install ".[hf]"')
    made = start_ranks(
        ["-W", "ignore", "-m", "tests.launch.fsdp_worker", "olmo", str(tmp_path)], tmp_path, 1,
        pythonpath=TRANSFORMERS,
    )[0]  # fmt: skip
    assert made.wait(timeout=120) == 0, (tmp_path / "output0.txt").read_text()[-3000:]
    folders = [str(tmp_path / f"step{step}-tokens{2 * step}B") for step in (1, 2, 3)]
    (Path(folders[1]) / "model.safetensors").write_bytes(
        (Path(folders[1]) / "model.safetensors").read_bytes()[:-1000]
    )
    given = ["--hf-model", *folders, "--moments", "warm:3", "--measure", "2"]
    status = measure(tmp_path / "out", given, flags("hugging face", data), monkeypatch)
    said = capsys.readouterr()
    assert status == 3, said
    assert "step2-tokens4B: skipped" in said.out
    rows = table(tmp_path / "out")
    assert [(row["iteration"], row["tokens"]) for row in rows] == [
        ("1", "2000000000.0"), ("3", "6000000000.0"),
    ]  # fmt: skip
    assert {row["endings"] for row in rows} == {"found:2"}
    assert rows[0]["mean"] != rows[1]["mean"]


def test_a_checkpoint_that_is_not_there_is_no_random_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: dict[str, Any]
) -> None:
    """Megatron itself begins with random weights unless it is told not to."""
    folder, _ = trained["fsdp"]
    for given in (["--load", str(tmp_path)], ["--load", str(folder), "--ckpt-step", "5"]):
        ranks = start_ranks(
            [*flags("fsdp", data), *given, "--exit-on-missing-checkpoint"], tmp_path, 1
        )
        assert ranks[0].wait(timeout=60) == 1
        said = (tmp_path / "output0.txt").read_text()
        assert "holds no checkpoint" in said or "--ckpt-step 5" in said
