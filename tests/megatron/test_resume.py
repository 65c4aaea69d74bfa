"""A resumed run measures what an uninterrupted one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.megatron.harness import MODEL, other_data, run
from tests.megatron.test_bitwise import MTP, SHARDED

# Without dropout: on the CPU the data loader draws from the same random state as dropout does, and
# Megatron makes it anew after a load.
LONG = MODEL.replace("--train-iters 6", "--train-iters 8").replace("dropout 0.1", "dropout 0.0")
# Without Transformer Engine or Apex Megatron cannot load a checkpoint of its distributed optimizer
# (it asks PyTorch's AdamW for steps that are not there yet), measured or not.
FLAGS = "--bf16"
MASTERS = "--use-distributed-optimizer --use-precision-aware-optimizer"


def rare(*values: str) -> Any:
    """A parameter of a test that waits for ``launch/test.sh --rare``."""
    return pytest.param(*values, marks=pytest.mark.rare)


# PyTorch's AdamW has no state of shards that are empty, as a small model has them on some rank, and
# Megatron-FSDP waits for ever when it saves them, measured or not. Transformer Engine's has.
@pytest.mark.parametrize(
    ("checkpoints", "sharding"),
    [
        ("torch", ""),
        ("torch_dist", ""),
        ("fsdp_dtensor", f"{SHARDED} no_shard"),
        rare("torch_dist", "--context-parallel-size 2"),
        rare("torch_dist", MTP),
        ("torch_dist", MASTERS),
        rare("torch_dist", f"{MASTERS} --main-params-dtype fp16"),
        rare("fsdp_dtensor", f"{SHARDED} optim --use-precision-aware-optimizer"),
        ("fsdp_dtensor", f"{SHARDED} optim_grads_params --use-precision-aware-optimizer"),
    ],
)
def test_resumed_measurements_are_the_uninterrupted_ones(
    checkpoints: str, sharding: str, tmp_path: Path
) -> None:
    flags = f"{FLAGS} {sharding} --critical-sharpness-eval-data sums={other_data(tmp_path)}"
    flags += " --measure-adam-snr"  # of moments that a checkpoint has brought
    saving = f"{flags} --ckpt-format {checkpoints} --save-interval 4 --save {tmp_path}/checkpoints"
    whole = run(tmp_path / "whole", flags, processes=2, every=2, model=LONG).expect_success()
    run(
        tmp_path / "first", f"{saving} --exit-interval 4", processes=2, every=2, model=LONG
    ).expect_success()
    second = run(
        tmp_path / "second", f"{saving} --load {tmp_path}/checkpoints", processes=2, every=2,
        model=LONG,
    ).expect_success()  # fmt: skip
    assert [record["iteration"] for record in second.records] == [6, 8]
    # Those of other data too, whose search starts where its own last one ended.
    assert len(second.timeless_records) == 4
    assert second.timeless_records == whole.timeless_records[4:]
    assert all(record["adam_snr"] for record in second.records)


def test_a_checkpoint_without_the_state_loads(tmp_path: Path) -> None:
    saving = f"{FLAGS} --save-interval 4 --save {tmp_path}/checkpoints"
    run(tmp_path / "first", f"{saving} --exit-interval 4", model=LONG).expect_success()
    second = run(
        tmp_path / "second", f"{saving} --load {tmp_path}/checkpoints", every=2, model=LONG
    ).expect_success()
    assert [record["status"] for record in second.records] == ["found", "found"]


def test_a_checkpoint_of_a_measured_run_loads_where_nothing_is_measured(tmp_path: Path) -> None:
    saving = f"{FLAGS} --save-interval 4 --save {tmp_path}/checkpoints"
    whole = run(tmp_path / "whole", FLAGS, model=LONG).expect_success()
    run(tmp_path / "first", f"{saving} --exit-interval 4", every=2, model=LONG).expect_success()
    second = run(
        tmp_path / "second", f"{saving} --load {tmp_path}/checkpoints", model=LONG
    ).expect_success()
    # Megatron's log averages the first iterations after a start.
    assert second.training_lines[2:] == whole.training_lines[6:]


@pytest.mark.rare
def test_a_resumed_run_with_its_optimizer_on_the_host_trains_as_without_measurements(
    tmp_path: Path,
) -> None:
    # Megatron itself goes on otherwise than an uninterrupted run, measured or not.
    flags = f"{FLAGS} {MASTERS} --optimizer-cpu-offload --optimizer-offload-fraction 0.5"
    saving = f"{flags} --ckpt-format torch_dist --save {tmp_path}/checkpoints"
    first = f"{saving} --save-interval 4 --exit-interval 4"
    run(tmp_path / "first", first, processes=2, every=2, model=LONG).expect_success()
    plain, measured = (
        run(tmp_path / str(every), f"{flags} --load {tmp_path}/checkpoints", processes=2,
            every=every, model=LONG).expect_success()
        for every in (0, 2)
    )  # fmt: skip
    assert measured.hashes == plain.hashes
    assert [record["status"] for record in measured.records] == ["found", "found"]
