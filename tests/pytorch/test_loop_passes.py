"""Passes and what they draw, in loops of one's own."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.pytorch import CriticalSharpness
from tests.pytorch.loop import INPUTS, TARGETS, Loop, check_failed, check_found, check_same, net


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
        (optimizer, {"losses": [len]}, "losses=[<built-in function len>]: give a dictionary"),
        (optimizer, {"losses": {3: len}}, "losses=3: a name is a tag's last part"),
        (optimizer, {"sinks": [3]}, "sinks=3: it has no method write"),
        (optimizer, {"sinks": 3}, "sinks=3: give a list"),
        (optimizer, {"keep": 3}, "keep=3: give a list"),
        (optimizer, {"watch": "never"}, "watch='never': give 'first' or 'always'"),
    ]
    for given, options, said in wrong:
        with pytest.raises(InputError, match=re.escape(said)):
            CriticalSharpness(model, given, **options)
    with pytest.raises(TypeError, match=r"CriticalSharpness has no argument 'evry'; .* every, me"):
        CriticalSharpness(model, optimizer, evry=3)
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
