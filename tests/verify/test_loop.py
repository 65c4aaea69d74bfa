"""``verify(train)``: promises that hold, and faults that are found."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.core.state import State
from megatron_sharpness.pytorch import optimizer as lines
from megatron_sharpness.pytorch import step as observed
from megatron_sharpness.verify.loop import verify
from tests.verify import planted

Train = Callable[[Any], None]


def loop(
    steps: int = 100, seed: int | None = 0, noise: float = 0.0, jitter: float = 0.0,
    scale: float = 1.0, **options: Any,
) -> Train:  # fmt: skip
    """A loop with dropout and running statistics.

    Args:
        noise: by which a layer's first weights depend on the clock.
        jitter: by which gradients do so, relatively, at each step.
        scale: by which what is evaluated differs from what was trained on.
        options: of what measures.
    """

    def train(sharpness: Any) -> None:
        if seed is not None:
            torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Dropout(0.1), nn.Linear(32, 4)
        )
        if noise:
            clock = torch.Generator().manual_seed(time.time_ns())
            with torch.no_grad():
                weight = model[3].weight
                weight += noise * torch.randn(weight.shape, generator=clock)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        measured = sharpness(model, optimizer, every=100, **options)
        for step in range(steps):
            inputs = torch.randn(64, 16) * random.uniform(0.9, 1.1)
            targets = inputs[:, :4].argmax(dim=1)

            def loss_sum() -> tuple[Tensor, int]:
                loss = F.cross_entropy(model(inputs), targets, reduction="sum")  # noqa: B023
                return loss, 64

            loss, _ = loss_sum()
            (loss / 64).backward()
            for parameter in model.parameters() if jitter else ():
                assert parameter.grad is not None
                chance = torch.Generator().manual_seed(time.time_ns())
                parameter.grad *= 1 + jitter * torch.randn(parameter.shape, generator=chance)
            optimizer.step()
            optimizer.zero_grad()
            measured.after_step(
                step, lambda: (scale * loss_sum()[0], 64), loss=(loss.detach(), 64)
            )

    return train


def test_a_loop_that_is_measured_right(tmp_path: Path) -> None:
    found = verify(loop(), out=tmp_path / "out")
    assert found.status == 0, str(found)
    assert found.comparison.repeats and found.comparison.same
    assert found.comparison.iterations == 12
    assert [row["confirmed"] for row in found.numbers.rows] == [0, 3, 6, 9]
    assert found.numbers.found == 4
    document = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert document["status"] == 0
    assert torch.__version__.startswith(document["facts"]["versions"]["torch"])
    page = (tmp_path / "out" / "verify.md").read_text()
    assert page.startswith("# Critical sharpness verified: all promises hold")
    for row in ("an iteration without measurement", "a probe", "overhead at every 1000"):
        assert f"| {row} | " in page


def test_what_is_compared_holds_weights_moments_buffers_and_random_states(tmp_path: Path) -> None:
    verify(loop(), steps=3, out=tmp_path)
    lines = (tmp_path / "plain-1" / "rank-0.jsonl").read_text().splitlines()
    names = set().union(*(json.loads(line).get("changed", {}) for line in lines))
    for name in ("model.0.weight", "model.1.running_mean", "model.1.num_batches_tracked",
                 "optimizer.state[model.3.bias][exp_avg_sq]", "random states of torch",
                 "random states of python"):  # fmt: skip
        assert name in names, sorted(names)


def test_a_loop_without_seeds_repeats_all_the_same() -> None:
    found = verify(loop(seed=None))
    assert found.status == 0 and found.comparison.repeats, str(found)


def leave_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    move = lines.ModelOnLines.move
    monkeypatch.setattr(
        lines.ModelOnLines,
        "move",
        lambda self, fraction, part=None: move(self, 1.01 if fraction == 1.0 else fraction, part),
    )


def leave_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observed, "state_of", lambda **roots: State({}))


def leave_random_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observed.RandomStates, "restore", lambda self: None)


def move_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    move = lines.ModelOnLines.move
    monkeypatch.setattr(
        lines.ModelOnLines,
        "move",
        lambda self, fraction, part=None: move(self, 1.0 if fraction > 1.0 else fraction, part),
    )


#: Fault → what it changes, by name, after which step.
FAULTS = {
    leave_weights: "after iteration 0 on rank 0, in model.0.weight",
    leave_buffers: "after iteration 0 on rank 0, in model.1.running_mean",
    leave_random_states: "after iteration 0 on rank 0, in random states of torch",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_a_measurement_leaves_behind_is_found(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted.blind(monkeypatch.setattr)
    fault(monkeypatch)
    found = verify(loop())
    assert found.status == 1
    assert FAULTS[fault] in found.promises["training with measurement is the same"], str(found)
    assert found.page().startswith("# Critical sharpness verified: a promise does not hold")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_and_so_it_is_by_the_runs_own_watch(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    found = verify(loop())
    assert found.status == 1
    assert "changed what training reads later" in found.promises["the number is right"], str(found)


def test_probes_that_do_not_move_the_weights_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    move_nothing(monkeypatch)
    found = verify(loop())
    assert found.status == 1 and found.comparison.same
    assert "the probes do not move the weights" in str(found)


@pytest.mark.parametrize("scale", [1.001, 0.5])
def test_a_loss_that_is_reduced_wrongly_is_found(scale: float) -> None:
    found = verify(loop(scale=scale))
    assert found.status == 1 and found.comparison.same
    assert found.promises["the number is right"].startswith("NO: iteration 0: "), str(found)


def test_a_training_that_does_not_repeat_is_told_apart() -> None:
    found = verify(loop(noise=0.1))
    assert found.status == 2
    assert not found.comparison.repeats and found.comparison.same
    said = found.promises
    assert "part before the first iteration on rank 0, in model.3.weight. Give what init" in (
        said["training repeats by itself"]
    )
    assert said["training with measurement is the same"].startswith("not told: runs that begin")


def test_a_training_whose_kernels_do_not_repeat_is_as_far_as_that_can_be_told() -> None:
    found = verify(loop(jitter=1e-6))
    assert found.status == 0 and not found.comparison.repeats, str(found)
    said = found.promises
    assert "part after iteration 0 on rank 0, in " in said["training repeats by itself"]
    assert "--deterministic-mode" in said["training repeats by itself"]
    assert said["training with measurement is the same"].startswith("as far as that can be told")
    assert found.page().startswith("# Critical sharpness verified: as far as it can be told")


@pytest.mark.parametrize(
    "fault", [leave_weights, leave_random_states], ids=lambda fault: fault.__name__
)
def test_a_measurement_that_disturbs_such_a_training_is_found(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted.blind(monkeypatch.setattr)
    fault(monkeypatch)
    found = verify(loop(jitter=1e-6))
    assert not found.comparison.repeats
    assert found.status == 1, str(found)
    assert found.promises["training with measurement is the same"].startswith("NO: ")


def test_without_a_number_it_is_not_told() -> None:
    def train(sharpness: Any) -> None:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        measured = sharpness(model, optimizer)
        for step in range(12):
            inputs = torch.randn(8, 4)

            def loss_sum() -> tuple[Tensor, int]:
                return model(inputs).square().sum(), 8  # noqa: B023

            (loss_sum()[0] / 8).backward()
            optimizer.step()
            optimizer.zero_grad()
            measured.after_step(step, loss_sum)

    found = verify(train)
    assert found.status == 2
    said = found.promises["the number is right"]
    assert said.startswith("not told: no measurement has found an η_c (zero_lr)")


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (loop(steps=5), {}, "steps=12: the loop has made 5"),
        (loop(), {"steps": 2}, "steps=2: with every=3 nothing would be measured"),
        (loop(), {"every": 0}, "every=0: "),
        (loop(frozen=0), {}, "frozen=0: it trains nothing"),
    ],
)
def test_what_cannot_be_verified_is_refused(
    train: Train, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        verify(train, **options)


def test_several_processes_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="out=None: "):
        verify(loop())


def test_a_folder_with_files_of_ones_own_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "measured" / "data.csv"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(InputError, match=r"data.csv would be lost"):
        verify(loop(), out=tmp_path)
    assert own.read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out .*file: "):
        verify(loop(), out=tmp_path / "file")


def test_a_loop_that_trains_twice_is_refused() -> None:
    def twice(sharpness: Any) -> None:
        loop(steps=3)(sharpness)
        loop()(sharpness)

    with pytest.raises(InputError, match="must train once"):
        verify(twice)


def test_a_folder_is_verified_in_again(tmp_path: Path) -> None:
    for steps in (12, 4):
        found = verify(loop(), steps, out=tmp_path)
        assert found.status == 0 and found.comparison.iterations == steps
        assert len(found.numbers.rows) == (steps + 2) // 3
