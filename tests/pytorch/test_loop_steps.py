"""The weights around the step, in loops of one's own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.optim import SGD, Optimizer

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.pytorch import CriticalSharpness
from tests.pytorch.loop import Loop, check_failed, check_found, check_same, net


class Clamp(Loop):
    def afterwards(self, step: int) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.clamp_(-0.25, 0.25)


class ClampThroughData(Clamp):
    def afterwards(self, step: int) -> None:
        for parameter in self.model.parameters():
            parameter.data.clamp_(-0.25, 0.25)


class Swapped(Loop):
    """Another tensor in a parameter's place, as weight averaging does."""

    def afterwards(self, step: int) -> None:
        self.model[0].weight.data = self.model[0].weight.data * 0.5


@pytest.mark.parametrize("loop", [Clamp, ClampThroughData, Swapped])
def test_weights_that_the_loop_changes_after_the_step_stay(loop: type[Loop]) -> None:
    check_failed(loop, "were changed between SGD.step and after_step", "Call after_step right")


@pytest.mark.parametrize("loop", [Clamp, Swapped])
def test_frozen_refuses_what_it_cannot_take_back(loop: type[Loop]) -> None:
    with pytest.raises(RuntimeError, match=r"step 1 cannot be taken back: .*were changed between"):
        loop(2, frozen=0).run()


class Rebinding(SGD):
    """Puts new tensors into ``p.data``: all of them, or every other one."""

    stride = 1

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for i, parameter in enumerate(group["params"]):
                moved = parameter.data - group["lr"] * parameter.grad
                if i % self.stride:
                    parameter.data.copy_(moved)
                else:
                    parameter.data = moved


class EveryOther(Rebinding):
    stride = 2


@pytest.mark.parametrize("kind", [Rebinding, EveryOther])
def test_a_parameter_that_is_put_elsewhere_is_followed(kind: type[SGD]) -> None:
    class Rebound(Loop):
        def make_optimizer(self) -> Optimizer:
            return kind(self.model.parameters(), lr=self.lr)

    measured = check_found(Rebound)
    for step, record in measured.records.items():
        assert record.critical_lr == pytest.approx(measured.true_critical_lr(step), rel=1e-4)
    frozen = Rebound(2, frozen=0)
    before = frozen.weights()
    frozen.run()
    for name, weight in frozen.weights().items():
        assert torch.equal(weight, before[name])


class SAM(SGD):
    """Climbs before it calls its closure, and goes back (sharpness-aware minimization)."""

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        held = [p.detach().clone() for p in self.param_groups[0]["params"]]
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(parameter.grad, alpha=2.0)
        self.zero_grad()
        closure()
        for parameter, weight in zip(self.param_groups[0]["params"], held, strict=True):
            parameter.data = weight
        super().step()


class SAMLoop(Loop):
    def make_optimizer(self) -> Optimizer:
        return SAM(self.model.parameters(), lr=self.lr)

    def update(self) -> None:
        def closure() -> None:
            (self.loss(0) / 64).backward()

        self.optimizer.step(closure)


def test_the_line_begins_where_step_was_called() -> None:
    measured = check_found(SAMLoop)
    for step, record in measured.records.items():
        assert record.critical_lr == pytest.approx(measured.true_critical_lr(step), rel=1e-4)
        assert record.slope is None  # the gradient is that of another point


class ByHand(Loop):
    """The optimizer's ``step`` is never called."""

    def update(self) -> None:
        for parameter in self.model.parameters():
            parameter.data.sub_(parameter.grad, alpha=self.lr)


def test_a_step_that_is_made_another_way_is_no_skipped_step() -> None:
    check_failed(ByHand, "have changed, and not in SGD.step, which was not called")


class NoStep(Loop):
    def update(self) -> None:
        pass


def test_a_skipped_step_has_its_reason() -> None:
    for record in check_same(NoStep).records.values():
        assert record.status == "skipped_step" and "was not called since" in str(record.reason)


class Lookahead(Optimizer):
    """As most public ones: shares the inner one's groups, and never calls Optimizer.__init__."""

    def __init__(self, inner: Optimizer, hooks: bool) -> None:
        self.optimizer, self.param_groups, self.state = inner, inner.param_groups, inner.state
        self.defaults, self.steps = inner.defaults, 0
        if hooks:
            self._optimizer_step_pre_hooks = OrderedDict()  # type: ignore[var-annotated]
            self._optimizer_step_post_hooks = OrderedDict()  # type: ignore[var-annotated]
        self.slow = [p.detach().clone() for p in inner.param_groups[0]["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)
        self.steps += 1
        if self.steps % 3 == 0:
            for parameter, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                slow.lerp_(parameter.detach(), 0.9)
                parameter.data.copy_(slow)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_an_optimizer_around_another_is_measured_as_a_whole(hooks: bool, inner: bool) -> None:
    class Wrapped(Loop):
        def make_optimizer(self) -> Optimizer:
            return Lookahead(SGD(self.model.parameters(), lr=self.lr), hooks)

        def given(self) -> Any:
            return self.optimizer.optimizer if inner else self.optimizer

    loop = Wrapped(3).run(6)
    assert Wrapped(0).run(6).digest() == loop.digest()
    assert not {"step"} & set(vars(loop.optimizer))
    for step, record in loop.records.items():
        if inner:
            assert "give the outermost optimizer" in str(record.reason)
        else:
            assert record.critical_lr == pytest.approx(loop.true_critical_lr(step), rel=1e-4)


def test_a_scheduler_made_while_a_wrapper_is_watched_stays() -> None:
    loop = Loop(0)
    wrapper = Lookahead(SGD(loop.model.parameters(), lr=0.3), hooks=False)
    sharpness = CriticalSharpness(loop.model, wrapper, 1)
    watched = wrapper.step
    wrapper.step = lambda *args: watched(*args)  # type: ignore[method-assign]
    theirs = wrapper.step
    sharpness.close()
    assert wrapper.step is theirs
    loop.loss(0).backward()
    wrapper.step()


def test_an_average_over_ranks_now_and_then_is_refused_by_name() -> None:
    class Averager:
        def average_parameters(self, parameters: Any) -> None: ...

    model = net()
    wrapped = PostLocalSGDOptimizer(SGD(model.parameters(), lr=0.3), Averager())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="PostLocalSGDOptimizer averages the weights"):
        CriticalSharpness(model, wrapped)


class Normalizing(SGD):
    """Computes in the gradients' own memory, as schedule-free optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.data.div_(parameter.grad.norm())
        super().step()


def test_a_gradient_that_the_step_overwrites_costs_the_slope_alone() -> None:
    class Overwritten(Loop):
        def make_optimizer(self) -> Optimizer:
            return Normalizing(self.model.parameters(), lr=self.lr)

    measured = check_found(Overwritten)
    for step, record in measured.records.items():
        assert record.slope is None
        assert record.critical_lr == pytest.approx(measured.true_critical_lr(step), rel=1e-4)
