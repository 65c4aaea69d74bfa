"""What loops do beside forward, backward, step: the same training to the bit, and the right number
or a record that says why there is none."""

from __future__ import annotations

import copy
import hashlib
import random
import re
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.optim import SGD, AdamW, Optimizer, SparseAdam
from torch.utils.checkpoint import checkpoint

from megatron_sharpness.core.errors import InputError, ProbeError
from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.core.state import State
from megatron_sharpness.pytorch import CriticalSharpness

from .training import critical_fraction

INPUTS = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(3))
TARGETS = INPUTS[..., :3].argmax(-1)


def net(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 3))


class Loop:
    """A loop of a few steps, on micro-batches; a subclass changes what is special about it.

    Attributes:
        trained: the loss of each step, by number.
        ends: the weights before and after each step.
    """

    lr = 0.3
    micro_batches = 1

    def __init__(self, every: int = 2, **options: Any) -> None:
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        self.model = self.make_model()
        self.optimizer = self.make_optimizer()
        self.sharpness = CriticalSharpness(
            self.model, self.given(), every, **{"tolerance": 1e-3, **options}
        )
        self.records: dict[int, Measurement] = {}
        self.trained: dict[int, float] = {}
        self.ends: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def make_model(self) -> nn.Module:
        return net()

    def make_optimizer(self) -> Any:
        return SGD(self.model.parameters(), lr=self.lr)

    def given(self) -> Any:
        """What is given to CriticalSharpness."""
        return self.optimizer

    def loss(self, i: int) -> Tensor:
        """Sum over a micro-batch."""
        return F.cross_entropy(self.model(INPUTS[i]), TARGETS[i], reduction="sum")

    def evaluate(self) -> tuple[Any, int]:
        losses = [self.loss(i) for i in range(self.micro_batches)]
        return torch.stack(losses).sum(), 64 * self.micro_batches

    def update(self) -> None:
        self.optimizer.step()

    def afterwards(self, step: int) -> None:
        """Between the step and the measurement."""

    def measure(self, step: int) -> Measurement | None:
        return self.sharpness.after_step(step, self.evaluate)

    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach().double().clone() for n, p in self.model.named_parameters()}

    def step(self, step: int) -> None:
        before, total = self.weights(), 0.0
        for i in range(self.micro_batches):
            loss = self.loss(i) / (64 * self.micro_batches)
            loss.backward()
            total += loss.item()
        self.update()
        self.optimizer.zero_grad()
        self.trained[step], self.ends[step] = total, (before, self.weights())
        self.afterwards(step)
        record = self.measure(step)
        if record is not None:
            self.records[step] = record

    def run(self, steps: int = 4) -> Loop:
        for step in range(1, steps + 1):
            self.step(step)
        return self

    def digest(self) -> str:
        """Of all that training reads later."""
        held = State({"model": self.model}, parameters=True)
        states = [v for s in getattr(self.optimizer, "state", {}).values() for v in s.values()]
        tensors = [*held.tensors.values(), *(v for v in states if isinstance(v, Tensor))]
        digest = hashlib.sha256()
        for tensor in [*tensors, torch.get_rng_state()]:
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        plain = {name: value for name, value in held.plain.items() if "hooks" not in name}
        digest.update(repr((plain, random.getstate(), np.random.get_state())).encode())
        return digest.hexdigest()

    def true_critical_lr(self, step: int) -> float:
        """η_c of that step without dropout, from its two ends, in fp64."""
        before, after = self.ends[step]
        model = copy.deepcopy(self.model).double()

        def loss(fraction: Tensor) -> Tensor:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(torch.lerp(before[name], after[name], fraction))
                return F.cross_entropy(model(INPUTS[0].double()), TARGETS[0])

        return critical_fraction(loss) * self.lr


def check_same(loop: type[Loop], **options: Any) -> Loop:
    """Trains with and without measurement, to the same bit; returns the one with."""
    measured = loop(2, **options).run()
    assert loop(0).run().digest() == measured.digest()
    assert list(measured.records) == [2, 4]
    return measured


def check_found(loop: type[Loop], **options: Any) -> Loop:
    """And the loss is the trained one, with its masks."""
    measured = check_same(loop, **options)
    for step, record in measured.records.items():
        assert record.status == "found", record.reason
        assert record.loss == pytest.approx(measured.trained[step], rel=1e-6)
    return measured


def check_failed(loop: type[Loop], *said: str, **options: Any) -> Loop:
    measured = check_same(loop, **options)
    for record in measured.records.values():
        assert record.status == "failed" and record.critical_lr is None
        for words in said:
            assert words in str(record.reason)
    return measured


# What a forward pass changes outside of buffers.


class Tally:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.calls, self.means = 0, [0.0]


class Stateful(nn.Module):
    """Keeps state in plain attributes, on which its output depends."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 32), nn.Linear(32, 3)
        self.hidden = torch.zeros(64, 32)
        self.calls = 0
        self.queue: deque[Tensor] = deque(maxlen=3)
        self.generator = torch.Generator().manual_seed(1)
        self.numbers = np.random.default_rng(1)
        self.tally = Tally()
        self.scales = {"of": [1.0]}
        self.seen = np.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.rand(x.shape, generator=self.generator) + self.numbers.random()
        h = torch.tanh(self.inner(x + 0.1 * noise) + 0.5 * self.hidden)
        self.hidden = h.detach()  # a new tensor, as truncated backpropagation through time has it
        self.queue.append(h.detach().mean(0))
        self.tally.calls += 1
        self.tally.means.append(h.mean().item())
        self.scales["of"].append(self.scales["of"][-1] * 0.99)
        self.seen += 1.0
        if not hasattr(self, "made_late"):
            self.made_late = torch.ones(32)
        self.made_late.mul_(0.999)
        h = h * self.made_late * self.scales["of"][-1] + torch.stack(tuple(self.queue)).mean(0)
        return self.out(h + 0.01 * self.tally.means[-2] + 0.001 * self.seen[0] * self.calls)


class StatefulLoop(Loop):
    micro_batches = 2

    def make_model(self) -> nn.Module:
        return Stateful()


def test_state_outside_of_buffers_is_kept() -> None:
    measured = check_found(StatefulLoop)
    model = measured.model
    assert isinstance(model, Stateful)
    assert (model.calls, model.tally.calls, len(model.tally.means)) == (8, 8, 9)


def test_the_watch_names_what_is_not_kept_and_that_is_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_sharpness.pytorch.step.State.restore", lambda state: None)
    loop = StatefulLoop(2).run()
    reason = str(loop.records[2].reason)
    assert reason.startswith("the measurement has changed what training reads later: ")
    assert loop.records[2].status == loop.records[4].status == "failed"
    assert loop.records[4].reason == reason and loop.records[4].evaluations == 0
    monkeypatch.setattr("megatron_sharpness.core.checks.NAMED", 99)
    reason = str(StatefulLoop(2).run().records[2].reason)
    for name in (
        "model.hidden", "model.calls", "model.queue[0]", "model.generator", "model.numbers",
        "model.tally.calls", "model.tally.means[", "model.scales[of]", "model.seen",
        "model.made_late",
    ):  # fmt: skip
        assert name in reason
    with pytest.raises(ProbeError, match=r"model\.hidden"):
        StatefulLoop(2, on_error="raise").run()


def test_what_the_watch_can_put_back_it_puts_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, containers, small tensors: here all that there is."""
    real, asked = State.restore, []

    def restore_of_the_watch(state: State) -> None:
        asked.append(state)
        if state._parameters:
            real(state)

    monkeypatch.setattr(State, "restore", restore_of_the_watch)
    assert StatefulLoop(2).run().digest() == StatefulLoop(0).run().digest()


class LateChange(Loop):
    """Something changes in passes without gradients from the second measurement on."""

    def make_model(self) -> nn.Module:
        model = net()
        model.changed = [0]
        return model

    def evaluate(self) -> tuple[Any, int]:
        if self.records:
            # Out of reach of what is kept: only the watch looks at gradients.
            self.model[0].weight.grad = torch.ones_like(self.model[0].weight)
        return super().evaluate()


def test_every_measurement_is_watched_where_that_is_asked_for() -> None:
    assert [r.status for r in LateChange(2).run().records.values()] == ["found", "found"]
    always = LateChange(2, watch="always").run()
    assert [r.status for r in always.records.values()] == ["found", "failed"]
    assert "model.0.weight.grad" in str(always.records[4].reason)


class Normalizer:
    """Beside the model, with running statistics."""

    def __init__(self) -> None:
        self.mean = torch.zeros(8)

    def __call__(self, x: Tensor) -> Tensor:
        self.mean = self.mean.lerp(x.mean(0) + 1.0, 0.1)
        return x - self.mean


class KeptBeside(Loop):
    def make_model(self) -> nn.Module:
        self.normalizer = Normalizer()
        return net()

    def loss(self, i: int) -> Tensor:
        return F.cross_entropy(self.model(self.normalizer(INPUTS[i])), TARGETS[i], reduction="sum")

    def digest(self) -> str:
        return super().digest() + str(self.normalizer.mean.tolist())


def test_an_object_beside_the_model_is_kept_where_it_is_given() -> None:
    class Given(KeptBeside):
        def __init__(self, every: int = 2, **options: Any) -> None:
            super().__init__(every, **options)
            self.sharpness.close()
            self.sharpness = CriticalSharpness(
                self.model, self.optimizer, every, keep=[self.normalizer], tolerance=1e-3
            )

    check_found(Given)
    # Not seen, where it is not given: it can be reached from nothing.
    assert KeptBeside(2).run().digest() != KeptBeside(0).run().digest()


# The weights around the step.


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


# Passes and what they draw.


class Passes(Loop):
    micro_batches = 3

    def make_model(self) -> nn.Module:
        return net(0.4)


class TeacherFirst(Passes):
    """The same module without gradients, in training mode, as adapters' references are."""

    def loss(self, i: int) -> Tensor:
        with torch.no_grad():
            teacher = self.model(INPUTS[i])
        return super().loss(i) + 64 * F.mse_loss(self.model(INPUTS[i]), teacher)


class TeacherLast(Passes):
    def loss(self, i: int) -> Tensor:
        loss = super().loss(i)
        with torch.no_grad():
            teacher = self.model(INPUTS[i])
        return loss + 64 * F.mse_loss(self.model(INPUTS[i]), teacher)


class TeacherInEvaluationMode(Passes):
    def loss(self, i: int) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            teacher = self.model(INPUTS[i])
        self.model.train()
        return super().loss(i) + 64 * F.mse_loss(self.model(INPUTS[i]), teacher)


class Recomputed(Passes):
    reentrant = False

    def loss(self, i: int) -> Tensor:
        inputs = INPUTS[i].clone().requires_grad_()
        outputs = checkpoint(self.model, inputs, use_reentrant=self.reentrant)
        return F.cross_entropy(outputs, TARGETS[i], reduction="sum")  # type: ignore[arg-type]


class RecomputedWithReentry(Recomputed):
    reentrant = True


class NoiseInTheLoss(Passes):
    def loss(self, i: int) -> Tensor:
        noisy = INPUTS[i] + 0.5 * torch.randn_like(INPUTS[i])
        logits = self.model(noisy)
        logits = logits + 0.1 * torch.randn_like(logits)
        return F.cross_entropy(logits, TARGETS[i], reduction="sum")


class ValidationInTrainingMode(Passes):
    """Passes without gradients that are no part of the step."""

    def step(self, step: int) -> None:
        with torch.no_grad():
            self.model(INPUTS[3])
        super().step(step)


@pytest.mark.parametrize(
    "loop",
    [
        TeacherFirst, TeacherLast, TeacherInEvaluationMode, Recomputed, RecomputedWithReentry,
        NoiseInTheLoss, ValidationInTrainingMode,
    ],
)  # fmt: skip
def test_masks_are_those_of_the_passes_that_drew_them(loop: type[Loop]) -> None:
    check_found(loop)


class Joined(Passes):
    """Evaluates all micro-batches in one pass."""

    def evaluate(self) -> tuple[Any, int]:
        together = self.model(INPUTS[:3].flatten(0, 1))
        return F.cross_entropy(together, TARGETS[:3].flatten(), reduction="sum"), 192


def test_passes_that_do_not_match_have_a_reason() -> None:
    check_failed(Joined, "called the model 3 times, and evaluate calls it 1 times")

    class WithoutDropout(Joined):
        def make_model(self) -> nn.Module:
            return net(0.0)

    check_found(WithoutDropout)  # nothing was drawn: nothing to match


class Augmented(NoiseInTheLoss):
    """Draws for its data, too, so that no one knows where the noise began."""

    def step(self, step: int) -> None:
        torch.rand(1)
        super().step(step)


def test_draws_that_cannot_be_matched_have_a_reason() -> None:
    check_failed(Augmented, "draws random numbers outside of the model")

    class Told(Augmented):
        def measure(self, step: int) -> Measurement | None:
            return self.sharpness.after_step(step, self.evaluate, loss=(self.trained[step], 1))

    check_failed(Told, "and the step was trained on")  # it does matter

    class Harmless(Told):
        """What an iterator over a data loader draws changes no loss."""

        def loss(self, i: int) -> Tensor:
            torch.rand(1)
            return Loop.loss(self, i)

    check_found(Harmless)


def test_draws_that_begin_not_to_match_later_have_a_reason() -> None:
    """As at each new epoch of a loader, once the first measurement has been passed."""

    class Epochs(NoiseInTheLoss):
        def step(self, step: int) -> None:
            if step == 4:
                torch.rand(1)
            super().step(step)

        def measure(self, step: int) -> Measurement | None:
            return self.sharpness.after_step(step, self.evaluate, loss=(self.trained[step], 1))

    records = check_same(Epochs).records
    assert records[2].status == "found" and records[4].status == "failed"
    assert "L(θ) is off by" in str(records[4].reason) and records[4].critical_lr is None


class TwoSteps(Loop):
    def update(self) -> None:
        super().update()
        super().update()


def test_two_steps_under_one_number_have_a_reason() -> None:
    check_failed(TwoSteps, "SGD.step was called 2 times since the last after_step")


def test_a_step_that_only_makes_the_optimizers_state_does_not_count() -> None:
    """As checkpoints are saved or loaded: with a learning rate of 0."""

    class Resumed(Passes):
        def make_optimizer(self) -> Optimizer:
            return AdamW(self.model.parameters(), lr=self.lr / 10)

        def step(self, step: int) -> None:
            if step == 2:
                self.optimizer.state.clear()
                get_optimizer_state_dict(self.model, self.optimizer)
            super().step(step)

    check_found(Resumed)


class Numbered(Loop):
    """Numbers other than 1, 2, 3, …"""

    number: Callable[[int], int] = staticmethod(lambda step: 4 * step)

    def measure(self, step: int) -> Measurement | None:
        return self.sharpness.after_step(type(self).number(step), self.evaluate)


def test_numbers_may_grow_by_more_than_one() -> None:
    loop = Numbered(8).run(6)
    assert [r.status for r in loop.records.values()] == ["failed", "found", "found"]
    assert "came after step 4" in str(loop.records[2].reason)
    for step in (4, 6):
        assert loop.records[step].loss == pytest.approx(loop.trained[step], rel=1e-6)


def test_an_interval_that_is_never_due_is_said_once() -> None:
    class Odd(Numbered):
        number = staticmethod(lambda step: 4 * step - 1)

    with pytest.warns(UserWarning, match="every=2 divides none of the numbers 7, 11") as said:
        assert not Odd(2).run(8).records
    assert len(said) == 1
    with pytest.raises(InputError, match=r"every=2\.5: an interval is a positive whole number"):
        CriticalSharpness(net(), [], every=2.5)  # type: ignore[arg-type]


def test_a_lazy_module_is_refused_before_it_has_its_weights() -> None:
    class Lazy(Loop):
        def make_model(self) -> nn.Module:
            return nn.Sequential(nn.LazyLinear(32), nn.Tanh(), nn.LazyLinear(3))

    with pytest.raises(InputError, match="of lazy modules; make CriticalSharpness"):
        Lazy(1)


def test_what_is_given_is_checked() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.3)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (None, {}, "optimizer: NoneType is not a torch.optim.Optimizer"),
        (optimizer, {"frozen": 1.5}, "frozen=1.5: a number of steps"),
        (optimizer, {"losses": {"a": 1}}, "1 is no function"),
        (optimizer, {"sinks": [3]}, "sinks=3: it has no method write"),
        (optimizer, {"watch": "never"}, "watch='never': give 'first' or 'always'"),
    ]
    for given, options, said in wrong:
        with pytest.raises(InputError, match=re.escape(said)):
            CriticalSharpness(model, given, **options)
    sharpness = CriticalSharpness(model, optimizer)
    with pytest.raises(InputError, match=r"step=2\.5: a step has a whole number"):
        sharpness.after_step(2.5, lambda: (0.0, 1))  # type: ignore[arg-type]
    sharpness.after_step(np.int64(2), lambda: (0.0, 1))  # type: ignore[arg-type]


def test_a_model_may_be_copied_and_saved_while_it_is_observed(tmp_path: Any) -> None:
    loop = Passes(1)
    loop.step(1)
    average, copies = copy.deepcopy(loop.model), []
    torch.save(loop.model, tmp_path / "model.pt")
    loop.model[0].register_forward_hook(lambda *_: copies.append(copy.deepcopy(loop.model)))
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    average(INPUTS[0]), loaded(INPUTS[0])  # no passes of the step
    loop.step(2)
    copies[0](INPUTS[0])
    assert loop.records[2].loss == pytest.approx(loop.trained[2], rel=1e-6)


# Losses and gradients of other kinds.


def test_sparse_gradients_cost_the_slope_alone() -> None:
    class Sparse(Loop):
        def make_model(self) -> nn.Module:
            return nn.Sequential(nn.Embedding(30, 8, sparse=True), nn.Flatten(), nn.Linear(64, 3))

        def make_optimizer(self) -> Any:
            embedding, *rest = self.model.parameters()
            self.both = [SparseAdam([embedding], lr=1e-2), AdamW(rest, lr=1e-2)]
            return self.both[0]

        def given(self) -> Any:
            return self.both

        def update(self) -> None:
            for optimizer in self.both:
                optimizer.step()

        def loss(self, i: int) -> Tensor:
            tokens = (INPUTS[i] * 10).long().abs() % 30
            return F.cross_entropy(self.model(tokens), TARGETS[i], reduction="sum")

    for record in check_found(Sparse).records.values():
        assert record.slope is None and record.update_norm


def test_weights_that_the_model_does_not_read_have_a_reason() -> None:
    class Masters(Loop):
        def make_optimizer(self) -> Any:
            self.masters = [p.detach().clone().requires_grad_() for p in self.model.parameters()]
            return SGD(self.masters, lr=self.lr)

        def update(self) -> None:
            for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
                master.grad, parameter.grad = parameter.grad, None
            super().update()

        def afterwards(self, step: int) -> None:
            with torch.no_grad():
                for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
                    parameter.copy_(master)

    check_failed(Masters, "that no optimizer given steps", "fp32 copies beside the model")

    class Unread(Masters):
        def afterwards(self, step: int) -> None:
            """The model stays as it is."""

    check_failed(Unread, "does not read the parameters that the optimizer steps")


def test_all_optimizers_of_the_step_have_to_be_given() -> None:
    class OneOfTwo(Loop):
        def make_optimizer(self) -> Any:
            self.other = SGD(self.model[0].parameters(), lr=self.lr)
            return SGD(self.model[3].parameters(), lr=self.lr)

        def update(self) -> None:
            super().update()
            self.other.step()
            self.other.zero_grad()

    check_failed(OneOfTwo, "have changed that no optimizer given steps", "give all optimizers")


def test_a_frozen_parameter_that_passes_change_is_kept_where_it_is_given() -> None:
    class Codebook(Loop):
        def make_model(self) -> nn.Module:
            model = net()
            model.codes = nn.Parameter(torch.zeros(8), requires_grad=False)
            return model

        def make_optimizer(self) -> Any:
            return SGD([p for p in self.model.parameters() if p.requires_grad], lr=self.lr)

        def loss(self, i: int) -> Tensor:
            with torch.no_grad():
                self.model.codes.lerp_(INPUTS[i].mean(0) + 1.0, 0.1)
            inputs = INPUTS[i] - self.model.codes
            return F.cross_entropy(self.model(inputs), TARGETS[i], reduction="sum")

    for record in Codebook(2).run().records.values():
        assert record.status == "failed" and "keep" in str(record.reason)

    class Given(Codebook):
        def __init__(self, every: int = 2) -> None:
            super().__init__(0)
            self.sharpness = CriticalSharpness(
                self.model, self.optimizer, every, keep=[self.model.codes], tolerance=1e-3
            )

    check_found(Given)


class Penalty(Loop):
    """A loss that differentiates: its value holds the gradient's norm."""

    def loss(self, i: int) -> Tensor:
        inputs = INPUTS[i].clone().requires_grad_()
        outputs = self.model(inputs)
        (gradient,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
        loss = F.cross_entropy(outputs, TARGETS[i], reduction="sum")
        return loss + gradient.square().sum()


def test_a_loss_that_differentiates_is_told_how() -> None:
    check_failed(Penalty, "evaluate is called under no_grad", "torch.enable_grad()")

    class Enabled(Penalty):
        def evaluate(self) -> tuple[Any, int]:
            with torch.enable_grad():
                return self.loss(0).detach(), 64

    check_found(Enabled)
