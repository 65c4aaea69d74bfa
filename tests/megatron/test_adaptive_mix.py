"""``--adaptive-mix`` in Megatron's own training: on layouts, resumed, refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.digest import hash_of
from tests.domains import write_domains
from tests.megatron.harness import MODEL, Run, run

TRAINING = MODEL.replace("--mock-data", "").replace("dropout 0.1", "dropout 0")
TRAINING = TRAINING.replace("--vocab-size 255", "--vocab-size 257")
EVERY = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_domains(tmp_path_factory.mktemp("data"))


def train(folder: Path, data: Path, flags: str = "", *, prose: float = 0.25, **options: Any) -> Run:
    """With this share of prose at the start; 1 is prose alone, without ``--adaptive-mix``."""
    given = f"--data-path {data}/prose"
    if prose < 1:
        given = f"--data-path {prose} {data}/prose {1 - prose} {data}/code"
        given += " --adaptive-mix prose code --adaptive-mix-every 1"
    given += f" --data-cache-path {data}/cache"
    given += f" --critical-sharpness-eval-data prose={data}/prose code={data}/code"
    return run(folder, f"{given} {flags}", every=EVERY, model=TRAINING, **options)


def shares(result: Run) -> list[float]:
    """The share from each adjustment on."""
    return [float(share) for share in re.findall(r"component: \S+ -> (\S+) \|", result.output)]


def test_data_parallel_ranks_draw_and_adjust_the_same_mix(data: Path, tmp_path: Path) -> None:
    alone = train(tmp_path / "one", data).expect_success()
    together = train(
        tmp_path / "two", data, "--use-distributed-optimizer", processes=2
    ).expect_success()
    assert len(shares(alone)) == 3 and len({0.25, *shares(alone)}) == 4
    assert shares(together) == pytest.approx(shares(alone), abs=2e-3)
    for one, two in zip(alone.records, together.records, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        "--tensor-model-parallel-size 2",
        "--pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1",
    ],
)
def test_all_that_read_a_batch_read_the_same(layout: str, data: Path, tmp_path: Path) -> None:
    # Weights differ between these layouts, hence a share that goes a whole step at a time.
    steps = "--adaptive-mix-gain 100"
    alone = train(tmp_path / "one", data, steps).expect_success()
    together = train(tmp_path / "two", data, f"{layout} {steps}", processes=2).expect_success()
    assert shares(together) == shares(alone) == [0.2, 0.15, 0.1]
    nothing = hash_of([])
    read = [rank["next batch"] for rank in together.hashes if rank["next batch"] != nothing]
    assert set(read) == {alone.hashes[0]["next batch"]}
    assert len(read) == (2 if "pipeline" in layout else 1)


def test_a_share_holds_from_the_step_after_its_measurement_on(data: Path, tmp_path: Path) -> None:
    fixed = train(tmp_path / "fixed", data, "--adaptive-mix-rate 0").expect_success()
    moved = train(
        tmp_path / "moved", data, "--adaptive-mix-rate 0.5 --adaptive-mix-gain 100"
    ).expect_success()
    assert shares(fixed) == [0.25] * 3
    assert shares(moved)[0] in (0.05, 0.75)
    assert moved.training_lines[:EVERY] == fixed.training_lines[:EVERY]
    assert moved.training_lines[EVERY] != fixed.training_lines[EVERY]


def test_the_first_component_has_the_share(data: Path, tmp_path: Path) -> None:
    flags = "--adaptive-mix-bounds 0 1 --adaptive-mix-rate 0"
    nearly = train(tmp_path / "nearly", data, flags, prose=1 - 1e-9).expect_success()
    prose = train(tmp_path / "prose", data, prose=1).expect_success()
    assert nearly.training_lines == prose.training_lines


def test_a_resumed_run_goes_on_with_its_mix(data: Path, tmp_path: Path) -> None:
    saving = f"--bf16 --save-interval 4 --save {tmp_path}/checkpoints"
    whole = train(tmp_path / "whole", data, "--bf16", processes=2).expect_success()
    train(tmp_path / "first", data, f"{saving} --exit-interval 4", processes=2).expect_success()
    rest = train(
        tmp_path / "rest", data, f"{saving} --load {tmp_path}/checkpoints", processes=2
    ).expect_success()  # fmt: skip
    assert f"share of the first component of {shares(whole)[1]:.4f}" in rest.output
    assert shares(rest) == shares(whole)[2:]
    # Megatron logs the first iteration after a load, and counts it in the next line once more.
    assert rest.training_lines[0] == whole.training_lines[4]
    assert rest.timeless_records == whole.timeless_records[6:]


def test_the_share_is_a_curve_of_tensorboard(data: Path, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    result = train(tmp_path, data).expect_success()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    curve = {event.step: event.value for event in events.Scalars("data-mix-share")}
    used = [0.25, *shares(result)[:-1]]
    assert curve == pytest.approx(dict(zip((2, 4, 6), used, strict=True)), abs=1e-4)
    assert [event.step for event in events.Scalars("data-mix-share vs samples")] == [16, 32, 48]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataloader-type cyclic", "--dataloader-type cyclic has an order of its own"),
        ("--adaptive-mix prose maths", "--critical-sharpness-eval-data has no maths"),
        ("--critical-sharpness-frozen 2", "--critical-sharpness-frozen trains nothing"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_the_first_step(
    flags: str, message: str, data: Path, tmp_path: Path
) -> None:
    result = train(tmp_path, data, flags)
    assert result.returncode != 0 and not result.training_lines
    assert message in result.output
