"""What a training loop meets: when it measures, what it costs, and how it fails."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sharpness.core.errors import InputError, ProbeError
from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.core.update_line import UpdateLine
from megatron_sharpness.pytorch import CriticalSharpness
from megatron_sharpness.sinks import ConsoleSink, JsonLinesSink

from .gpt import loss_sum, make_batch, make_gpt


class Loop:
    """A training loop on one process, with dropout; the learning rate falls at each step."""

    def __init__(self, every: int = 2, *, model: nn.Module | None = None, **options: Any) -> None:
        self.model = make_gpt(0.2) if model is None else model
        self.optimizer = AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.records: list[Measurement] = []
        self.sharpness = CriticalSharpness(
            self.model, self.optimizer, every, sinks=[self], **options
        )
        self.evaluations = 0
        self.loss = math.nan
        torch.manual_seed(7)

    def write(self, measurement: Measurement) -> None:
        self.records.append(measurement)

    def evaluate(self, step: int) -> tuple[Tensor, Tensor]:
        self.evaluations += 1
        return loss_sum(self.model, make_batch(step, 0, 0))

    def step(self, step: int, evaluate: Callable[[], Any] | None = None) -> Measurement | None:
        loss, tokens = loss_sum(self.model, make_batch(step, 0, 0))
        self.loss = loss.item() / tokens.item()
        (loss / tokens).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.sharpness.after_step(step, evaluate or (lambda: self.evaluate(step)))

    def state(self) -> list[Tensor]:
        optimizer = [v for s in self.optimizer.state.values() for v in s.values()]
        found = [*self.model.state_dict().values(), *optimizer, torch.get_rng_state()]
        return [tensor.clone() for tensor in found]

    @property
    def hooks(self) -> int:
        owners = (
            self.optimizer._optimizer_step_pre_hooks,
            self.optimizer._optimizer_step_post_hooks,
        )
        return sum(map(len, owners)) + len(self.model._forward_pre_hooks)


def undisturbed(steps: int) -> list[Tensor]:
    loop = Loop(every=0)
    for step in range(steps):
        loop.step(step)
    return loop.state()


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_measures_the_steps_that_are_due_and_leaves_the_others_alone() -> None:
    loop = Loop(every=3)
    hooks = []
    for step in range(1, 8):
        record = loop.step(step)
        assert (record is not None) == (step in (3, 6))
        hooks.append(loop.hooks)
    # Before steps 3 and 6 it observes: the optimizer on both sides, and the model.
    assert hooks == [0, 3, 0, 0, 3, 0, 0]
    assert [record.iteration for record in loop.records] == [3, 6]
    assert loop.records[0].lr == 1e-2 and loop.records[0].consumed_samples is None


def test_off_is_off() -> None:
    loop = Loop(every=0)
    assert loop.hooks == 0 and not loop.sharpness.armed
    assert loop.step(0) is None and loop.evaluations == 0 and loop.hooks == 0


def test_the_loss_is_that_of_the_training_pass_with_its_dropout_masks() -> None:
    loop = Loop(every=1)
    for step in range(3):
        record = loop.step(step)
        assert record is not None and record.loss == loop.loss


def test_a_validation_between_the_steps_is_no_part_of_the_step() -> None:
    loop = Loop(every=1)
    loop.step(0)
    with torch.no_grad():
        loop.evaluate(99)
    record = loop.step(1)
    assert record is not None and record.loss == loop.loss


def test_a_loop_that_calls_the_model_another_way_is_told_so() -> None:
    loop = Loop(every=1)
    tokens, targets = make_batch(0, 0, 0)
    F.cross_entropy(loop.model.forward(tokens).flatten(0, 1), targets.flatten()).backward()
    loop.optimizer.step()
    with pytest.warns(UserWarning, match="give it as the loop calls it"):
        record = loop.sharpness.after_step(0, lambda: loop.evaluate(0))
    assert record is not None and record.status == "found"


def test_an_autocast_region_around_the_loop_does_not_keep_casts_of_other_weights() -> None:
    inside = Loop(every=1)
    with torch.autocast("cpu", torch.bfloat16):
        measured = inside.step(0)

    outside = Loop(every=1)

    def evaluate() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return outside.evaluate(0)

    with torch.autocast("cpu", torch.bfloat16):
        loss, tokens = loss_sum(outside.model, make_batch(0, 0, 0))
        (loss / tokens).backward()
    outside.optimizer.step()
    expected = outside.sharpness.after_step(0, evaluate)
    assert measured is not None and expected is not None and measured.status == "found"
    assert measured.critical_lr == expected.critical_lr


def test_a_step_that_was_not_observed_is_said_to_be_so() -> None:
    loop = Loop(every=10)
    loop.step(7)
    with pytest.warns(UserWarning, match="consecutive numbers"):
        record = loop.step(10)
    assert record is not None and record.status == "failed" and loop.evaluations == 0
    assert record.reason is not None and "step 10 came after step 7" in record.reason


def test_no_learning_rate_and_no_update_are_statuses() -> None:
    loop = Loop(every=1)
    loop.optimizer.param_groups[0]["lr"] = 0.0
    record = loop.step(0)
    assert record is not None and record.status == "zero_lr"

    skipped = loop.sharpness.after_step(1, lambda: loop.evaluate(1))  # no optimizer.step()
    assert skipped is not None and skipped.status == "skipped_step"

    loop.optimizer.param_groups[0]["lr"] = 1e-2
    loop.model.train()
    loop.optimizer.step()  # without gradients nothing moves, as under an overflow on the device
    unmoved = loop.sharpness.after_step(2, lambda: loop.evaluate(2))
    assert unmoved is not None and unmoved.status == "skipped_step" and unmoved.lr == 1e-2
    assert loop.evaluations == 0


@pytest.mark.parametrize("norm", [0.0, math.nan])
def test_gradients_of_no_norm_are_no_error(norm: float) -> None:
    loop = Loop(every=1)
    loss, _ = loop.evaluate(0)
    (0.0 * loss).backward()
    loop.optimizer.step()  # weight decay alone
    record = loop.sharpness.after_step(0, lambda: loop.evaluate(0), grad_norm=norm)
    assert record is not None and record.slope == 0.0 and record.status != "failed"


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_under_loss_scaling_is_a_skipped_step(fused: bool) -> None:
    model = nn.Linear(4, 1)
    optimizer = SGD(model.parameters(), lr=0.1, fused=fused)
    sharpness = CriticalSharpness(model, optimizer, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    inputs = torch.full((2, 4), 1e30)

    def evaluate() -> tuple[Tensor, int]:
        return model(inputs).sum(), 2

    scaler.scale(evaluate()[0]).backward()  # type: ignore[no-untyped-call]
    scaler.step(optimizer)
    scaler.update()
    record = sharpness.after_step(0, evaluate)
    assert record is not None and record.status == "skipped_step"


def fails_at(number: int, evaluate: Callable[[], Any], error: Exception) -> Callable[[], Any]:
    """``evaluate``, which raises at its ``number``-th call after it has called the model."""
    calls = 0

    def failing() -> Any:
        nonlocal calls
        calls += 1
        result = evaluate()
        if calls == number:
            raise error
        return result

    return failing


@pytest.mark.parametrize("number", [1, 2, 4])
def test_an_error_costs_the_measurement_alone(number: int) -> None:
    loop = Loop(every=2)
    with pytest.warns(UserWarning, match="step 0 was not measured: .*no memory"):
        record = loop.step(0, fails_at(number, lambda: loop.evaluate(0), MemoryError("no memory")))
    assert record is not None and record.status == "failed"
    for step in (1, 2):
        loop.step(step)
    assert [record.status for record in loop.records] == ["failed", "found"]
    assert same(loop.state(), undisturbed(3))


def test_an_error_can_end_the_run_with_everything_put_back() -> None:
    loop = Loop(every=2, on_error="raise")
    with pytest.raises(ProbeError, match="no memory"):
        loop.step(0, fails_at(3, lambda: loop.evaluate(0), MemoryError("no memory")))
    assert [record.status for record in loop.records] == ["failed"]
    assert same(loop.state(), undisturbed(1)) and loop.hooks == 0


def test_no_memory_for_the_copy_costs_the_measurement_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = Loop(every=2)

    def clone(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory for a copy")

    with monkeypatch.context() as patched, pytest.warns(UserWarning, match="for a copy"):
        patched.setattr(UpdateLine, "_copy", lambda _, tensor: clone(tensor))
        record = loop.step(0)
    assert record is not None and record.status == "failed" and loop.evaluations == 0
    loop.step(1)
    assert same(loop.state(), undisturbed(2))


def test_a_loss_that_is_not_a_number_is_a_record() -> None:
    loop = Loop(every=1)
    record = loop.step(0, lambda: (loop.evaluate(0)[0] * math.nan, 4))
    assert record is not None and record.status == "non_finite" and record.critical_lr is None


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (torch.tensor(1.0), "is Tensor; it is to be a tuple"),
        ((torch.tensor(1.0, dtype=torch.bfloat16), 4), "bfloat16, too coarse"),
        ((torch.ones(3), 3), r"shape \(3,\); it is to be the sum"),
    ],
)
def test_what_evaluate_returns_is_checked(returned: Any, said: str) -> None:
    loop = Loop(every=1)
    with pytest.warns(UserWarning, match=said):
        record = loop.step(0, lambda: returned)
    assert record is not None and record.status == "failed"


def test_a_resumed_run_measures_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    straight = Loop()
    for step in range(7):
        straight.step(step)

    first = Loop()
    for step in range(4):
        first.step(step)
    parts = {"model": first.model.state_dict(), "random": torch.get_rng_state()}
    dcp.save({**parts, "sharpness": first.sharpness}, checkpoint_id=tmp_path)
    torch.save(first.optimizer.state_dict(), tmp_path / "optimizer.pt")

    second = Loop()
    second.optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    parts = {"model": second.model.state_dict(), "random": torch.get_rng_state()}
    dcp.load({**parts, "sharpness": second.sharpness}, checkpoint_id=tmp_path)
    torch.set_rng_state(parts["random"])
    assert second.sharpness.state_dict() == first.sharpness.state_dict()
    assert [name for name, _ in second.sharpness.state_dict()["guesses"]] == ["train"]
    for step in range(4, 7):
        second.step(step)
    assert same(second.state(), straight.state())
    timeless = [dataclasses.replace(record, seconds=0.0) for record in first.records]
    timeless += [dataclasses.replace(record, seconds=0.0) for record in second.records]
    assert timeless == [dataclasses.replace(record, seconds=0.0) for record in straight.records]


def test_closed_it_leaves_no_hook() -> None:
    loop = Loop(every=1)
    loop.step(0)
    assert loop.hooks == 3
    loop.sharpness.close()
    assert loop.hooks == 0


def test_a_loss_or_a_gradient_that_is_not_finite_has_its_status_and_rings() -> None:
    loop = Loop(every=1, alarm=1.0, parts={"embeddings": "embed"})
    loop.step(0)
    batch = make_batch(1, 0, 0)
    loss, tokens = loss_sum(loop.model, batch)
    (loss / tokens).backward()
    next(iter(loop.model.parameters())).grad.fill_(math.nan)  # type: ignore[union-attr]
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    records = [loop.sharpness.after_step(1, lambda: loss_sum(loop.model, batch)), loop.step(2)]
    for record in records:
        assert record is not None and record.status == "non_finite"
        assert record.reason == "the gradient or the update is not finite"
    assert {record.status for record in loop.sharpness.records.values()} == {"non_finite"}
    assert loop.sharpness._meter.bell.rings


@pytest.mark.parametrize("frozen", [None, 0])
def test_closed_it_says_the_verdict_once(tmp_path: Path, frozen: int | None) -> None:
    said: list[str] = []
    sinks = [ConsoleSink(said.append), JsonLinesSink(tmp_path / "log.jsonl")]
    model = make_gpt(0.0)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    sharpness = CriticalSharpness(model, optimizer, 1, sinks, frozen=frozen)
    for step in range(5):
        batch = make_batch(step, 0, 0)
        loss, tokens = loss_sum(model, batch)
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        sharpness.after_step(step, lambda batch=batch: loss_sum(model, batch))
    measured = len(said)
    sharpness.close()
    sharpness.close()
    verdicts = [line for line in said[measured:] if "verdict: " in line]
    assert len(verdicts) == (1 if frozen is None else 0)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made within it have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage().data_ptr()
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                size = tensor.untyped_storage().nbytes()
                self.live += size
                weakref.finalize(tensor, self._free, size)
        self.peak = max(self.peak, self.live)
        return made

    def _free(self, size: int) -> None:
        self.live -= size


def test_it_takes_two_copies_of_the_parameters_and_no_more() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(20)))
    one = 64 * 64 * 4
    optimizer = SGD(model.parameters(), lr=0.1)
    sharpness = CriticalSharpness(model, optimizer, every=1)

    def evaluate() -> tuple[Tensor, int]:
        return torch.stack([(p - 0.5).square().sum() for p in model.parameters()]).sum(), 1

    for step in range(2):
        evaluate()[0].backward()
        with LiveBytes() as seen:
            optimizer.step()
            after_the_step = seen.live
            record = sharpness.after_step(step, evaluate)
        assert record is not None and record.status == "found"
    # θ_t and θ_{t+1}, and beside them a few tensors of one parameter at a time.
    assert 40 * one <= after_the_step <= 41 * one
    assert seen.peak <= 46 * one
    assert seen.live <= one


def test_flash_attention_is_measured_through_where_it_has_no_second_derivative() -> None:
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        loop = Loop(every=1)
        record = loop.step(0)
        assert record is not None and record.status == "found"

        parameters = [p for p in loop.model.parameters() if p.requires_grad]
        loss, _ = loop.evaluate(0)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        product = sum(torch.sum(g * torch.ones_like(g)) for g in gradients)
        with pytest.raises(
            RuntimeError, match=r"derivative for .*flash_attention.* not implemented"
        ):
            torch.autograd.grad(product, parameters)  # type: ignore[arg-type]


def test_compiled_once_and_then_no_more() -> None:
    torch._dynamo.reset()
    loop = Loop(every=1, model=torch.compile(make_gpt(0.2), backend="aot_eager"))  # type: ignore[arg-type]
    counters = torch._dynamo.utils.counters["stats"]
    compiled = []
    for step in range(3):
        record = loop.step(step)
        assert record is not None and record.status == "found"
        compiled.append(counters["unique_graphs"])
    assert compiled[0] == compiled[1] == compiled[2] > 0


def refused(model: nn.Module, optimizer: Any, said: str, **options: Any) -> None:
    with pytest.raises(InputError, match=said):
        CriticalSharpness(model, optimizer, **options)


def test_what_cannot_be_measured_is_refused_at_the_start() -> None:
    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    refused(model, optimizer, "every=-1: an interval", every=-1)
    refused(model, optimizer, "tolerance=2.0: a relative width", tolerance=2.0)
    refused(model, optimizer, "mode='test'", mode="test")
    refused(model, optimizer, "offload='disk'", offload="disk")
    refused(model, [optimizer, SGD([model.weight], lr=0.1)], "two of the optimizers step the same")
    refused(model, torch.optim.LBFGS(model.parameters()), "LBFGS searches its own step")
    refused(model, [model], "Linear is not a torch.optim.Optimizer")
    refused(model, [], "steps no parameter")
    unnamed = SGD(model.parameters(), lr=0.1)
    unnamed.param_groups[0]["lr"] = None
    refused(model, unnamed, "lr=None")
    meta = nn.Linear(2, 2, device="meta")
    refused(meta, SGD(meta.parameters(), lr=0.1), "meta device")
