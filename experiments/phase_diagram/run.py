"""Early training over learning rate, width and depth, and its four regimes in time.

After Kalra and Barkeshli 2023 (arXiv 2302.12250): η = c/λ_0^H, λ_0^H being the largest eigenvalue
of the Hessian at initialization.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments import digits, training
from megatron_sharpness.pytorch import CriticalSharpness

EXAMPLES = 128
#: Steps in which loss and λ_max may rise above their first values, and after which the loss has
#: diverged or not: it is then not finite, or ``DIVERGED`` times the first one.
EARLY, LAST, DIVERGED = 10, 40, 1e4
#: λ_c is measured at the first step and at every third from there.
EVERY_THIRD = 3
#: c is two to the power of so many quarters, from √2 on until training diverges.
QUARTERS = range(2, 33)
WIDTHS, LARGE_WIDTHS = (256, 128, 64, 32, 16), (1024, 512)
#: Activation and number of layers.
NETWORKS = (("relu", 4), ("relu", 8), ("linear", 4))
SEEDS, LARGE_SEEDS = range(6), range(10)
#: Residual of an eigenvalue over it; the error of the eigenvalue is of second order in it.
TOLERANCE, LANCZOS_STEPS = 0.02, 100

#: The trajectory in which the four regimes are named: layers, width, c, steps, examples.
REGIMES_LAYERS, REGIMES_WIDTH, REGIMES_C, REGIMES_STEPS, REGIMES_EXAMPLES = 6, 64, 0.5, 600, 256
REGIME_SEEDS = range(8)
#: Each of the first steps is measured and every fifth later; the exact λ_max more seldom.
DENSE, EVERY, EXACT_EVERY = 50, 5, 20


@dataclass(frozen=True)
class Cell:
    """A network at initialization.

    Attributes:
        activation: ``relu`` or ``linear``.
        depth: the number of layers.
        width: of the hidden ones.
        seed: of the weights.
    """

    activation: str
    depth: int
    width: int
    seed: int

    def network(self) -> nn.Sequential:
        """Weights of variance 2 / inputs with ReLU, 1 / inputs without; biases that start at 0."""
        torch.manual_seed(self.seed)
        sizes = [64, *[self.width] * (self.depth - 1), 10]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            linear = nn.Linear(inputs, outputs)
            gain = 2.0 if self.activation == "relu" else 1.0
            nn.init.normal_(linear.weight, std=math.sqrt(gain / inputs))
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU() if self.activation == "relu" else nn.Identity()]
        return nn.Sequential(*layers[:-1])


def run(cell: Cell) -> list[training.Row]:
    """A row for each c, up to the first at which training diverges."""
    rows: list[training.Row] = []
    for quarters in QUARTERS:
        rows.append(early_training(cell, 2 ** (quarters / 4)))
        training.progress(f"{cell}: c = {rows[-1]['c']:.3g}")
        if rows[-1]["diverged"]:
            break
    return rows


def early_training(cell: Cell, c: float) -> training.Row:
    """Full-batch descent at η = c/λ_0^H.

    Returns:
        ``loss`` and ``hessian_sharpness`` at θ_0 to θ_10, ``critical_sharpness`` at θ_0, θ_3, θ_6
        and θ_9, None where η_c was not found, and whether the loss has ``diverged`` at last.
    """
    batch = digits.images(EXAMPLES, 1.0)
    model = cell.network()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    measured = CriticalSharpness(model, optimizer, every=EVERY_THIRD)
    losses: list[float] = []
    sharpness: list[float] = []
    critical: list[float | None] = []
    top: Tensor | None = None
    diverged = False
    for step in range(LAST + 1):
        loss = digits.squared_error(model, batch)
        diverged = not loss.item() < DIVERGED * (losses or [math.inf])[0]
        if diverged:
            break
        gradients = torch.autograd.grad(loss, parameters, create_graph=step <= EARLY)
        if step <= EARLY:
            losses.append(loss.item())
            largest, top = largest_eigenvalue(gradients, parameters, top)
            sharpness.append(largest)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.detach()
        optimizer.param_groups[0]["lr"] = c / sharpness[0]
        optimizer.step()
        if step < EARLY:
            record = measured.after_step(
                step + EVERY_THIRD, lambda: (digits.squared_error(model, batch), 1)
            )
            if record is not None:
                critical.append(record.critical_sharpness)
    return {
        "activation": cell.activation, "depth": cell.depth, "width": cell.width, "seed": cell.seed,
        "c": c, "diverged": diverged, "loss": training.short(losses, 4),
        "hessian_sharpness": training.short(sharpness, 4),
        "critical_sharpness": training.short(critical, 4),
    }  # fmt: skip


def largest_eigenvalue(
    gradients: Sequence[Tensor], parameters: Sequence[Tensor], start: Tensor | None = None
) -> tuple[float, Tensor]:
    """λ_max of the Hessian, and its eigenvector, by Lanczos from ``start``, or from the gradient.

    From the eigenvector of the step before it takes two Hessian-vector products in most steps.

    Args:
        gradients: of the loss, with their graph.
        parameters: that they are of.
        start: a vector that is near.
    """
    gradient = _flat(gradients)
    vector = gradient.detach() if start is None else start
    basis: list[Tensor] = []
    images: list[Tensor] = []
    while True:
        basis.append(vector / vector.norm())
        product = torch.autograd.grad(gradient, parameters, basis[-1], retain_graph=True)
        images.append(_flat(product))
        spanned, mapped = torch.stack(basis), torch.stack(images)
        values, vectors = torch.linalg.eigh(spanned @ mapped.T)
        eigenvector, largest = vectors[:, -1] @ spanned, values[-1]
        residual = vectors[:, -1] @ mapped - largest * eigenvector
        if residual.norm() <= TOLERANCE * largest.abs() or len(basis) == LANCZOS_STEPS:
            return float(largest), eigenvector
        vector = residual
        for _ in range(2):  # once is not enough in 32 bits
            vector = vector - spanned.T @ (spanned @ vector)


def regimes(seed: int) -> list[training.Row]:
    """A run long enough for the edge of stability, from PyTorch's own initialization."""
    batch = digits.images(REGIMES_EXAMPLES, 1.0)
    model = digits.network(REGIMES_WIDTH, REGIMES_LAYERS - 1, seed)
    parameters = list(model.parameters())
    loss = digits.squared_error(model, batch)
    largest, _ = largest_eigenvalue(
        torch.autograd.grad(loss, parameters, create_graph=True), parameters
    )
    rows = training.train(
        model, torch.optim.SGD(parameters, lr=REGIMES_C / largest), digits.squared_error,
        lambda step: batch, steps=REGIMES_STEPS, every=1, exact_every=EXACT_EVERY,
    )  # fmt: skip
    return [row for row in rows if row["iteration"] <= DENSE or row["iteration"] % EVERY == 0]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
