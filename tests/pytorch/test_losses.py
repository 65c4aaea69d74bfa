"""The loss that the loop gives, one that is wrong, and the precision that it is computed in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.pytorch import CriticalSharpness

STEPS = 6


def network(wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> nn.Module:
    torch.manual_seed(0)
    return wrap(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 4)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
    return inputs, inputs[:, :4].argmax(dim=1)


def cross_entropy(model: nn.Module, step: int, **options: Any) -> tuple[Tensor, int]:
    inputs, targets = batch(step)
    logits = model(inputs).float()
    return F.cross_entropy(logits, targets, reduction="sum", **options), len(targets)


Evaluate = Callable[[nn.Module, int], tuple[Tensor, int]]


def train(
    evaluate: Evaluate | None = None,
    *,
    gives: Callable[[Tensor, int], Any] | None = None,
    model: nn.Module | None = None,
    every: int = 2,
    loss: Evaluate = cross_entropy,
    lr: float = 1e-2,
    **options: Any,
) -> tuple[list[Measurement], list[Tensor], CriticalSharpness]:
    """Records, and what is left of training; ``gives`` makes ``loss=`` of the step's own."""
    model = network() if model is None else model
    optimizer = AdamW(model.parameters(), lr=lr)
    sharpness = CriticalSharpness(model, optimizer, every, **options)
    torch.manual_seed(7)
    records = []
    for step in range(1, STEPS + 1):
        total, tokens = loss(model, step)
        (total / tokens).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        record = sharpness.after_step(
            step,
            lambda: (evaluate or loss)(model, step),  # noqa: B023
            loss=None if gives is None else gives(total.detach(), tokens),
            grad_norm=norm,
        )
        records += [record] if record is not None else []
    return records, [*model.state_dict().values(), torch.get_rng_state()], sharpness


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_the_loss_that_is_given_saves_a_pass_and_changes_no_number() -> None:
    calls = {True: 0, False: 0}

    def counted(given: bool) -> Evaluate:
        def evaluate(model: nn.Module, step: int) -> tuple[Tensor, int]:
            calls[given] += 1
            return cross_entropy(model, step)

        return evaluate

    given, after, _ = train(counted(True), gives=lambda total, tokens: (total, tokens))
    without, before, _ = train(counted(False))
    assert same(after, before)
    assert calls[False] - calls[True] == STEPS // 2
    for one, other in zip(given, without, strict=True):
        assert one.replay_error == 0.0 and other.replay_error is None
        assert (one.loss, one.critical_lr, one.tokens) == (other.loss, other.critical_lr, 64)


@pytest.mark.parametrize("tokens", [64, 64.0, torch.tensor(64)])
def test_a_mean_and_one_are_as_good_a_loss_as_a_sum_and_its_tokens(tokens: Any) -> None:
    records, _, _ = train(gives=lambda total, _: (total / tokens, 1))
    assert [record.replay_error for record in records] == [pytest.approx(0, abs=1e-6)] * 3
    assert {record.tokens for record in records} == {64}


def mean(model: nn.Module, step: int) -> tuple[Tensor, int]:
    total, tokens = cross_entropy(model, step)
    return total / tokens, tokens


def smoothed(model: nn.Module, step: int) -> tuple[Tensor, int]:
    return cross_entropy(model, step, label_smoothing=0.3)


def squared(model: nn.Module, step: int) -> tuple[Tensor, int]:
    inputs, targets = batch(step)
    return (model(inputs) - 5 * F.one_hot(targets, 4)).square().sum(), len(targets)


def another_batch(model: nn.Module, step: int) -> tuple[Tensor, int]:
    return cross_entropy(model, step + 100)


class AnotherEachTime:
    def __init__(self) -> None:
        self.steps = itertools.count(50)

    def __call__(self, model: nn.Module, _: int) -> tuple[Tensor, int]:
        return cross_entropy(model, next(self.steps))


#: What the loop's function does wrong, and what is said of it where the training loss is known.
WRONG: dict[str, tuple[Callable[[], Evaluate], str]] = {
    "mean": (lambda: mean, "a mean where the sum"),
    "another loss": (lambda: smoothed, "another loss"),
    "another kind of loss": (lambda: squared, "another loss"),
    "another batch": (lambda: another_batch, "another batch"),
    "another batch at each call": (AnotherEachTime, "does not repeat"),
}


@pytest.mark.filterwarnings("ignore:critical sharpness of step")
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_loss_is_told_where_the_training_loss_is_given(kind: str) -> None:
    wrong, said = WRONG[kind]
    records, after, _ = train(wrong(), gives=lambda total, tokens: (total, tokens))
    assert same(after, train(every=0)[1])
    for record in records:
        assert record.status == "failed" and said in str(record.reason)
        assert record.critical_lr is None and record.critical_lr_lower is None


@pytest.mark.filterwarnings("ignore:critical sharpness of step")
@pytest.mark.parametrize("kind", ["mean", "another kind of loss", "another batch at each call"])
def test_a_wrong_loss_is_told_by_the_slope_where_it_is_not(kind: str) -> None:
    records, _, _ = train(WRONG[kind][0]())
    for record in records:
        assert record.status == "failed" and record.critical_lr is None
        assert "as fast as its gradient" in str(record.reason) or "repeat" in str(record.reason)


@pytest.mark.filterwarnings("ignore:critical sharpness of step")
@pytest.mark.parametrize("kind", ["another loss", "another batch", "another batch at each call"])
def test_before_training_all_losses_are_nearly_equal_and_one_that_is_wrong_is_told(
    kind: str,
) -> None:
    """In fp32: every batch has about ln 4 where the model says nothing yet."""
    wrong, said = WRONG[kind]
    model = network()
    with torch.no_grad():
        for parameter in model[-1].parameters():  # type: ignore[index]
            parameter.mul_(1e-2)
    (first, *_), _, _ = train(
        wrong(), gives=lambda total, tokens: (total, tokens), every=1, model=model
    )
    assert first.status == "failed" and said in str(first.reason)


@pytest.mark.filterwarnings("ignore:critical sharpness of step")
def test_a_wrong_loss_can_be_made_fatal() -> None:
    with pytest.raises(RuntimeError, match="a mean where the sum"):
        train(mean, gives=lambda total, tokens: (total, tokens), on_error="raise")


@pytest.mark.filterwarnings("ignore:critical sharpness of step")
@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (lambda total, tokens: total, "loss is Tensor; it is to be a tuple"),
        (lambda total, tokens: (total.bfloat16(), tokens), "loss has a loss in torch.bfloat16"),
        (lambda total, tokens: (1024 * total, tokens), "scaled for the backward pass"),
    ],
)
def test_a_loss_that_cannot_be_compared_is_named(gives: Any, said: str) -> None:
    (first, *_), _, _ = train(gives=gives)
    assert first.status == "failed" and said in str(first.reason)


def test_in_evaluation_mode_the_loss_is_another_one_and_is_not_compared() -> None:
    records, _, _ = train(mode="eval", gives=lambda total, tokens: (total, tokens))
    assert [record.status for record in records] == ["found"] * 3
    assert {record.replay_error for record in records} == {None}


@pytest.mark.filterwarnings("ignore:critical sharpness of step")
@pytest.mark.parametrize("wrong", [mean, squared])
def test_in_evaluation_mode_a_loss_that_is_nothing_like_it_is_told(wrong: Evaluate) -> None:
    records, _, _ = train(wrong, mode="eval", gives=lambda total, tokens: (total, tokens))
    for record in records:
        assert record.status == "failed" and "as fast as its gradient" in str(record.reason)


class AutocastInside(nn.Module):
    """As accelerate does it, and models of one's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found: Tensor = self.model(inputs)
            return found


def autocast_outside(model: nn.Module, step: int) -> tuple[Tensor, int]:
    with torch.autocast("cpu", torch.bfloat16):
        return cross_entropy(model, step)


def noises(records: list[Measurement]) -> list[float]:
    return [record.noise or math.nan for record in records]


def test_the_noise_of_weights_is_that_of_the_precision_which_a_pass_reads_them_in() -> None:
    exact = noises(train()[0])
    inside = noises(train(model=network(AutocastInside))[0])
    outside = noises(train(loss=autocast_outside)[0])
    assert inside == pytest.approx(outside, rel=0.2)
    assert all(a > 50 * b for a, b in zip(inside, exact, strict=True))


def nearly(model: nn.Module, step: int) -> tuple[Tensor, int]:
    """As kernels that do not repeat are in 16 bits."""
    total, tokens = cross_entropy(model, step)
    return total * (1 + 5e-4), tokens


def compiled(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return nn.Sequential(nn.Linear(16, 16), model)


@pytest.mark.filterwarnings("ignore:critical sharpness")
@pytest.mark.parametrize(
    ("wrap", "status"),
    [(nn.Sequential, "failed"), (AutocastInside, "found"), (compiled, "found")],
)
def test_in_16_bits_a_replay_may_be_further_off(
    wrap: Callable[[nn.Module], nn.Module], status: str
) -> None:
    """And in a compiled module, of which it is not known what it computes in."""
    model = network(wrap)
    (first, *_), _, _ = train(nearly, gives=lambda total, tokens: (total, tokens), model=model)
    assert first.status == status


def test_nothing_is_left_on_the_modules_that_were_asked_for_their_precision() -> None:
    model = network(AutocastInside)
    _, _, sharpness = train(model=model, every=STEPS)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == [0] * 6
    train(model=model, every=STEPS + 1)[2].close()
    assert [len(module._forward_pre_hooks) for module in model.modules()] == [0] * 6
    assert not sharpness.armed


def test_no_hook_is_put_into_a_compiled_module() -> None:
    """It would compile anew, and may compute other numbers then."""
    model = network()
    model.compile(backend="eager")
    seen: list[int] = []
    for module in model.modules():
        register = module.register_forward_pre_hook

        def counted(*args: Any, register: Any = register, **kwargs: Any) -> Any:
            seen.append(1)
            return register(*args, **kwargs)

        module.register_forward_pre_hook = counted  # type: ignore[method-assign]
    records, _, _ = train(model=nn.Sequential(model))
    assert [record.status for record in records] == ["found"] * 3
    assert seen == []


@pytest.mark.parametrize("lr", [1e-8, 1e-6, 1e-4, 1e-2])
def test_bf16_finds_what_fp32_finds_at_any_learning_rate(lr: float) -> None:
    exact, _, _ = train(lr=lr)
    rounded, _, _ = train(lr=lr, loss=autocast_outside)
    for one, other in zip(rounded, exact, strict=True):
        assert other.status == "found" and one.status in ("found", "noise_limited")
        if one.status == "found":
            assert one.critical_lr is not None and one.critical_lr_error is not None
            allowed = 0.1 + one.critical_lr_error
            assert one.critical_lr == pytest.approx(other.critical_lr, rel=allowed)
    assert sum(record.status == "found" for record in rounded) >= 2
