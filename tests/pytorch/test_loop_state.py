"""What a forward pass changes outside of buffers, in loops of one's own."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sharpness.core.errors import ProbeError
from megatron_sharpness.core.state import State
from megatron_sharpness.pytorch import CriticalSharpness
from tests.pytorch.loop import INPUTS, TARGETS, Loop, check_found, net


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
