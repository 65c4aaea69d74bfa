"""Losses and gradients of other kinds, in loops of one's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, SparseAdam

from megatron_sharpness.pytorch import CriticalSharpness
from tests.pytorch.loop import INPUTS, TARGETS, Loop, check_failed, check_found, net


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
