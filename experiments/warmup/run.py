"""What warm-up gains: target rates, lengths of warm-up and optimizers, on digits and a GPT."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments import digits, training
from experiments.gpt_wsd import run as gpt
from megatron_sharpness.core.measurement import Measurement, rate_over_critical
from megatron_sharpness.pytorch import CriticalSharpness

#: λ_c is measured at every so many steps, in the trainings of the first seed.
EVERY = 8
#: The final loss is the mean of the losses so many steps before the end.
BEFORE_END = (0, 4, 8, 12)
#: Of the network's width, digits to train on, and digits of a batch.
WIDTH, TRAINED_ON, BATCH = 128, 1400, 128
SEQUENCES, PIECES, HELD_OUT = 8, 128, 0.1
#: A rate that moves nothing far: that of the first update's measurement.
TRIAL = 1e-6

ADAM_BETA2 = {"digits": 0.999, "gpt": 0.95}
TARGETS = {
    ("digits", "sgd"): (0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56),
    ("digits", "adam"): (1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256),
    ("gpt", "sgd"): (0.03, 0.1, 0.3, 0.55, 1.0, 3.0),
    ("gpt", "adam"): (1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256),
}
MODELS = ("digits-sharp", "digits-flat", "gpt")
OPTIMIZERS = ("sgd", "adam", "gi-adam")


@dataclass(frozen=True)
class Size:
    """How much is trained.

    Attributes:
        steps: of a plain training.
        warmups: lengths of warm-up, the first being none.
        layers, width: of the GPT.
        seeds: how many.
    """

    steps: int
    warmups: tuple[int, ...]
    layers: int
    width: int
    seeds: int


DEFAULT = Size(steps=192, warmups=(1, 16, 64, 128), layers=2, width=32, seeds=9)
LARGE = Size(steps=768, warmups=(1, 64, 256, 512), layers=4, width=64, seeds=9)


class GIAdam(torch.optim.Adam):
    """Adam whose second moments begin at the first gradient squared, v₀ = g₁², their bias corrected
    as in Adam: its first update is √(1 − β₂) of Adam's (warm-up paper, Sec. 6)."""

    def step(self, closure: Any = None) -> Any:
        if not self.state:
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": parameter.grad.square(),
                }
        return super().step(closure)


@dataclass(frozen=True)
class Problem:
    """A model from its initial weights, its batches, and what its final loss is of."""

    model: str
    optimizer: str
    seed: int
    size: Size = DEFAULT

    @property
    def kind(self) -> str:
        return self.model.split("-")[0]

    @property
    def targets(self) -> tuple[float, ...]:
        """Target rates, from well below to where nothing trains."""
        return TARGETS[self.kind, self.optimizer.removeprefix("gi-")]

    @property
    def loss(self) -> Callable[[nn.Module, Any], Tensor]:
        return gpt.loss if self.kind == "gpt" else digits.squared_error

    def network(self) -> nn.Module:
        """Initial weights: He's for the digits, and a last layer of zeros where they begin flat."""
        if self.kind == "gpt":
            gpt_network: nn.Module = gpt.model(self.size.layers, self.size.width, self.seed)
            return gpt_network
        network = digits.network(WIDTH, 2, self.seed)
        layers = [layer for layer in network if isinstance(layer, nn.Linear)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.model == "digits-flat":
            nn.init.zeros_(layers[-1].weight)
        return network

    def optimizer_of(self, network: nn.Module) -> Optimizer:
        if self.optimizer == "sgd":
            momentum = 0.9 if self.kind == "gpt" else 0.0
            return torch.optim.SGD(network.parameters(), lr=TRIAL, momentum=momentum)
        kind = GIAdam if self.optimizer == "gi-adam" else torch.optim.Adam
        return kind(network.parameters(), lr=TRIAL, betas=(0.9, ADAM_BETA2[self.kind]))

    def batch_at(self, step: int) -> Any:
        """The batch of a step, the same at every rate."""
        if self.kind == "gpt":
            text, _ = gpt.texts(HELD_OUT)
            return gpt.windows(text, SEQUENCES, gpt.LENGTH, 100_000 * self.seed + step)
        inputs, labels = digits.images(TRAINED_ON, 1.0)
        chosen = np.random.default_rng((self.seed, step)).choice(TRAINED_ON, BATCH, replace=False)
        return inputs[chosen], labels[chosen]

    def held_out(self) -> Any:
        """What is not trained on."""
        if self.kind == "gpt":
            return gpt.windows(gpt.texts(HELD_OUT)[1], PIECES, gpt.LENGTH, 0)
        return tuple(values[TRAINED_ON:] for values in digits.images(1797, 1.0))


def chance(kind: str) -> float:
    """The held-out loss of the best prediction that does not look at its input."""
    if kind == "digits":
        share = digits.images(TRAINED_ON, 1.0)[1].mean(dim=0)
        labels = digits.images(1797, 1.0)[1][TRAINED_ON:]
        return 0.5 * (labels - share).square().sum(dim=1).mean().item()
    seen, other = (torch.bincount(text, minlength=257) for text in gpt.texts(HELD_OUT))
    return -(other / other.sum() * ((seen + 1) / (seen + 1).sum()).log()).sum().item()


def first_update(problem: Problem, step: int = 1) -> Measurement:
    """η_c of the first update from the initial weights, on the batch of ``step``: before training,
    from a model of its own."""
    network = problem.network()
    optimizer = problem.optimizer_of(network)
    sharpness = CriticalSharpness(network, optimizer, every=1)
    batch = problem.batch_at(step)
    problem.loss(network, batch).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    record = sharpness.after_step(1, lambda: (problem.loss(network, batch), 1))
    assert record is not None
    return record


@dataclass(frozen=True)
class Ramp:
    """η_t = min(η_trgt, η_init + (t − 1) η_trgt / T_wrm), steps counted from 1.

    The plain warm-up begins at η_init = η_trgt / T_wrm. One that begins at η_c is as steep, and so
    reaches the target T_wrm η_c / η_trgt − 1 steps earlier.
    """

    target: float
    warmup: int

    def saved(self, critical_lr: float | None) -> int:
        """Whole steps that it saves to begin at η_c."""
        if critical_lr is None:
            return 0
        return max(0, math.floor(self.warmup * min(1.0, critical_lr / self.target)) - 1)

    def rate_at(self, step: int, initial: float | None = None) -> float:
        slope = self.target / self.warmup
        return min(self.target, (slope if initial is None else initial) + (step - 1) * slope)


def train(
    problem: Problem, lr_at: Callable[[int], float], ends: Sequence[int], every: int = 0
) -> tuple[list[float], list[float | None]]:
    """The final losses of trainings that end at these steps, the last being the longest, and η/η_c
    at every so many steps. A loss that is not finite is infinite."""
    network = problem.network()
    optimizer = problem.optimizer_of(network)
    sharpness = CriticalSharpness(network, optimizer, every=every)
    held_out = problem.held_out()
    losses, ratios = {}, []
    for step, *_ in gpt.steps_of(
        network,
        [optimizer],
        sharpness,
        steps=ends[-1],
        tokens_at=problem.batch_at,
        lr_at=lr_at,
        mean_loss=problem.loss,
    ):
        if any(end - step in BEFORE_END for end in ends):
            with torch.no_grad():
                losses[step] = problem.loss(network, held_out).item()
        if every and step % every == 0:
            record = sharpness.records.train
            ratios.append(rate_over_critical(record.status, record.lr_over_critical))
    finals = [[losses.get(end - back, math.inf) for back in BEFORE_END] for end in ends]
    return [_mean(final) for final in finals], ratios


def run(problem: Problem) -> list[training.Row]:
    """All target rates and lengths of warm-up, from both initial rates: a row for each.

    ``plain`` is the final loss of the plain warm-up; ``cut`` that of a training which begins at η_c
    and is ``saved`` steps shorter, ``same`` if it is as long; ``shorter`` that of the plain one if
    it ended as early as ``cut``.
    """
    critical_lr = first_update(problem).critical_lr
    both = problem.optimizer != "gi-adam"
    every = EVERY if problem.seed == 0 else 0
    steps = problem.size.steps
    rows: list[training.Row] = []
    for warmup in problem.size.warmups if both else problem.size.warmups[::2]:
        for target in problem.targets:
            ramp = Ramp(target, warmup)
            saved = ramp.saved(critical_lr) if both else 0
            row: training.Row = {
                "model": problem.model, "optimizer": problem.optimizer, "seed": problem.seed,
                "target": target, "warmup": warmup, "critical_lr": critical_lr, "saved": saved,
            }  # fmt: skip
            (shorter, plain), ratios = train(problem, ramp.rate_at, (steps - saved, steps), every)
            row |= {"plain": training.short(plain, 5)}
            if saved:
                from_critical = functools.partial(ramp.rate_at, initial=critical_lr)
                (cut, same), _ = train(problem, from_critical, (steps - saved, steps))
                row |= training.short({"shorter": shorter, "cut": cut, "same": same}, 5)
            if every:
                row["lr_over_critical"] = training.short(ratios, 5)
            rows.append(row)
    training.progress(f"{problem.model}, {problem.optimizer}, seed {problem.seed}")
    return rows


#: Records of a start: steps at a low rate, how often the exact curvature, and batches for η_c.
NATURAL_STEPS, EXACT_EVERY, BATCHES = 96, 24, 8


def start(problem: Problem) -> list[training.Row]:
    """Where training begins: η_c of the first update on several batches; then, at a quarter of the
    lowest target rate, whether curvature rises (progressive sharpening) or falls (reduction)."""
    rows: list[training.Row] = [
        {"iteration": 0, "critical_lr": first_update(problem, step).critical_lr}
        for step in range(1, BATCHES + 1)
    ]
    network = problem.network()
    return rows + training.train(
        network, problem.optimizer_of(network), problem.loss, problem.batch_at,
        steps=NATURAL_STEPS, every=EXACT_EVERY, exact_every=EXACT_EVERY,
        lr_at=lambda step: problem.targets[0] / 4, hessian=problem.optimizer == "sgd",
    )  # fmt: skip


def _mean(losses: Sequence[float]) -> float:
    mean = sum(losses) / len(losses)
    return mean if math.isfinite(mean) else math.inf
